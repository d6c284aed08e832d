"""What the documentation says of settings, errors and states is what the code says."""

import json
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
import pytest

from server.problems import CODES, status_of
from zcore import errors
from zcore.errors import ZImageError
from zcore.jobs.states import chart
from zcore.settings import Settings, setting_names

TREE = Path(__file__).resolve().parents[2]
# Codes that belong to no class of ours: the database's absence, what else the framework refuses, a worker's death.
CODES_ELSEWHERE = {"database_unavailable", "refused", "worker_lost"}


def table(document: str) -> dict[str, list[str]]:
    """The rows of all tables whose first cell is a name in backticks, by that name."""
    rows: dict[str, list[str]] = {}
    for line in (TREE / document).read_text(encoding="utf-8").splitlines():
        if found := re.fullmatch(r"\| `([^`]+)` \| (.*) \|", line):
            name, cells = found[1], found[2].split(" | ")
            assert name not in rows, f"{document} says `{name}` twice"
            rows[name] = cells
    return rows


SETTINGS = table("docs/settings.md")
ERRORS = table("docs/errors.md")


def test_every_setting_is_documented_and_every_documented_one_exists() -> None:
    assert SETTINGS.keys() == setting_names().keys()


@pytest.mark.parametrize("name", sorted(setting_names()))
def test_a_settings_type_bounds_and_default_are_documented_as_they_are(name: str) -> None:
    bounds, default, meaning = SETTINGS[name]
    value: Any = Settings()
    for part in name.split("."):
        value = getattr(value, part)
    assert bounds == in_words(setting_names()[name])
    assert default == f"`{in_toml(value)}`"
    assert meaning.endswith(".")


def in_words(kind: Any) -> str:
    """A type with its bounds as the documentation has to write it."""
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return ", ".join(f"`{choice}`" for choice in kind)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin is tuple:
        return f"list of {in_words(arguments[0])}"
    if origin is dict:
        return "table of texts"
    if origin is Annotated:
        return f"{in_words(arguments[0])}{bounds_in_words(arguments[1])}"
    return {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}[kind]


def bounds_in_words(meta: msgspec.Meta) -> str:
    if meta.pattern is not None:
        return f": {meta.description}"
    low = (
        f" from {figure(meta.ge)}"
        if meta.ge is not None
        else f" above {figure(meta.gt)}"
        if meta.gt is not None
        else ""
    )
    high = f" to {figure(meta.le)}" if meta.le is not None else ""
    return f"{low}{high}" + (f", a multiple of {meta.multiple_of}" if meta.multiple_of else "")


def figure(number: float) -> str:
    return f"{number:,}".removesuffix(".0").replace(",", " ")


def in_toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(in_toml(one) for one in value)}]"
    return json.dumps(value)


def test_the_text_around_the_tables_names_only_settings_that_exist() -> None:
    text = (TREE / "docs" / "settings.md").read_text(encoding="utf-8")
    for variable in re.findall(r"ZIMAGE_[A-Z_]+__[A-Z_]+", text):
        assert variable.removeprefix("ZIMAGE_").lower().replace("__", ".") in setting_names()


def error_classes() -> list[type[ZImageError]]:
    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, ZImageError)]
    assert len(found) > 10
    return found


def test_every_error_code_is_documented_and_every_documented_one_exists() -> None:
    codes = {kind.code for kind in error_classes()} | set(CODES.values()) | CODES_ELSEWHERE
    assert ERRORS.keys() == codes


@pytest.mark.parametrize("kind", error_classes())
def test_an_errors_status_and_whether_to_retry_are_documented_as_they_are(kind: type[ZImageError]) -> None:
    _, retryable, status = ERRORS[kind.code]
    assert retryable == ("yes" if kind.retryable else "no")
    reaches_callers = not issubclass(kind, errors.Interruption)
    assert status == (str(int(status_of(kind.__new__(kind)))) if reaches_callers else "never")


def test_the_frameworks_refusals_are_documented_with_their_status() -> None:
    own = {kind.code for kind in error_classes()}
    for status, code in CODES.items():
        assert code in own or ERRORS[code][2] == str(int(status))


def test_error_codes_are_unique() -> None:
    codes = [kind.code for kind in error_classes()]
    assert len(set(codes)) == len(codes)


def test_the_readme_of_jobs_shows_the_law_as_it_is() -> None:
    text = (TREE / "zcore" / "jobs" / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- chart -->\n```mermaid\n(.*?)\n```\n<!-- /chart -->", text, flags=re.DOTALL)
    assert shown is not None
    assert shown[1] == chart()


def test_modules_named_in_the_readme_of_jobs_are_there() -> None:
    folder = TREE / "zcore" / "jobs"
    named = re.findall(r"^\| `(\w+\.py)` \|", (folder / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in folder.glob("*.py") if path.name != "__init__.py")
