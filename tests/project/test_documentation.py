"""The documentation agrees with the code: settings, error codes, states, file tables, paths and links."""

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from enum import StrEnum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
import pytest

from server.problems import CODES, status_of
from zcore import errors
from zcore.errors import ZImageError
from zcore.jobs.states import chart
from zcore.settings import Settings, setting_names

TREE = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for package in ("server", "worker", "zcore") for path in (TREE / package).rglob("*.py"))
READMES = sorted(path for package in ("server", "worker", "zcore") for path in (TREE / package).rglob("README.md"))
# Paths that documents name and that are not files of this tree.
ELSEWHERE = {
    "scripts/generate.py": "a script of the document whose promises docs/promises.md lists",
    "scripts/profiler.py": "a script of the same document",
    "experiments/attention_backend_benchmark.py": "a script of the same document",
}
# Errors that never reach a caller: ways to stop a generation inside a worker, a redirect to the sign-in page, and an
# address that the worker reports as `input_unavailable` or as the outcome of a webhook.
INTERNAL = (errors.Interruption, errors.SignedOut, errors.ForbiddenAddress)
FILE_SUFFIXES = (".py", ".md", ".toml", ".yml", ".html", ".js", ".css", ".lock", ".mako")


def table(document: str) -> dict[str, list[str]]:
    """Return the rows of all tables whose first cell is a name in backticks, by that name."""
    rows: dict[str, list[str]] = {}
    for line in (TREE / document).read_text(encoding="utf-8").splitlines():
        if found := re.fullmatch(r"\| `([^`]+)` \| (.*) \|", line):
            name, cells = found[1], found[2].split(" | ")
            assert name not in rows, f"{document} lists `{name}` twice"
            rows[name] = cells
    return rows


SETTINGS = table("docs/settings.md")
ERRORS = table("docs/errors.md")


def test_exactly_the_existing_settings_are_documented() -> None:
    assert SETTINGS.keys() == setting_names().keys()


@pytest.mark.parametrize("name", sorted(setting_names()))
def test_the_documented_type_bounds_and_default_of_a_setting_are_those_of_the_code(name: str) -> None:
    bounds, default, meaning = SETTINGS[name]
    value: Any = Settings()
    for part in name.split("."):
        value = getattr(value, part)
    assert bounds == in_words(setting_names()[name])
    assert default == ("unset" if value is None else f"`{in_toml(value)}`")
    assert meaning.endswith(".")


def in_words(kind: Any) -> str:
    """Return a type with its bounds as the documentation must write it."""
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return ", ".join(f"`{choice}`" for choice in kind)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin is UnionType or origin is Union:
        return in_words(next(argument for argument in arguments if argument is not NoneType))
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


def answered_classes() -> list[type[ZImageError]]:
    """Return the error classes that can reach a caller."""
    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, ZImageError)]
    assert len(found) > 10
    return [kind for kind in found if not issubclass(kind, INTERNAL)]


def sent_codes() -> set[str]:
    """Return every error code that the source can send.

    A code is a `code` of an error class, a status of the framework with a code of ours, or a text passed as the
    parameter `code` of any function or class of ours, as in `Failure("poison", ...)`.
    """
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    positions = {name: parameters.index("code") for name, parameters in signatures(nodes) if "code" in parameters}
    constants = {
        target.id: node.value.value
        for node in nodes
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id.isupper()
    }
    found = {kind.code for kind in answered_classes()} | set(CODES.values())
    for node in nodes:
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in positions:
            passed = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            passed += node.args[positions[called] :][:1]
            found.update(text for argument in passed for text in texts(argument, constants))
    return found


def signatures(nodes: list[ast.AST]) -> Iterator[tuple[str, list[str]]]:
    """Yield the parameters of each function and the annotated fields of each class, by name."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            parameters = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            yield node.name, [name for name in parameters if name not in ("self", "cls")]
        elif isinstance(node, ast.ClassDef):
            fields = [one.target for one in node.body if isinstance(one, ast.AnnAssign)]
            yield node.name, [field.id for field in fields if isinstance(field, ast.Name)]


def texts(argument: ast.expr, constants: dict[str, str]) -> Iterator[str]:
    """Yield the texts that an argument can be: itself, a constant's value, or the default of a look-up."""
    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
        yield argument.value
    elif isinstance(argument, ast.Name) and argument.id in constants:
        yield constants[argument.id]
    elif isinstance(argument, ast.Call) and isinstance(argument.func, ast.Attribute) and argument.func.attr == "get":
        yield from texts(argument.args[-1], constants)


def test_exactly_the_codes_that_are_sent_are_documented() -> None:
    codes = sent_codes()
    assert {"internal_error", "poison", "database_unavailable", "refused", "not_found"} <= codes
    assert ERRORS.keys() == codes


@pytest.mark.parametrize("kind", answered_classes())
def test_the_documented_status_and_retryability_of_an_error_are_those_of_the_code(kind: type[ZImageError]) -> None:
    _, retryable, status = ERRORS[kind.code]
    assert retryable == ("yes" if kind.retryable else "no")
    assert status == str(int(status_of(kind.__new__(kind))))


def test_refusals_of_the_framework_are_documented_with_their_status() -> None:
    own = {kind.code for kind in answered_classes()}
    for status, code in CODES.items():
        assert code in own or ERRORS[code][2] == str(int(status))


def test_error_codes_are_unique() -> None:
    codes = [
        value.code for value in vars(errors).values() if isinstance(value, type) and issubclass(value, ZImageError)
    ]
    assert len(set(codes)) == len(codes)


def test_the_readme_of_jobs_shows_the_transition_table() -> None:
    text = (TREE / "zcore" / "jobs" / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- chart -->\n```mermaid\n(.*?)\n```\n<!-- /chart -->", text, flags=re.DOTALL)
    assert shown is not None
    assert shown[1] == chart()


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_the_file_tables_of_a_package_list_its_files_and_no_others(readme: Path) -> None:
    """A row names a module, or a folder for all modules in it: `loop.py`, `network/rope.py`, `inputs/`."""
    folder = readme.parent
    listed = [path for cell in first_cells(readme, "file") for path in re.findall(r"`([^`]+)`", cell)]
    assert listed, "a package README has a table of files, headed `file`"
    assert len(set(listed)) == len(listed), "a file is listed twice"
    assert [path for path in listed if not (folder / path).exists()] == []
    modules = [path.relative_to(folder).as_posix() for path in folder.rglob("*.py") if path.name != "__init__.py"]
    folders = tuple(path for path in listed if path.endswith("/"))
    assert [path for path in sorted(modules) if path not in listed and not path.startswith(folders)] == []


def test_the_map_of_the_readme_lists_every_folder_and_package() -> None:
    mapped = [path for cell in first_cells(TREE / "README.md", "path") for path in re.findall(r"`([^`]+)`", cell)]
    assert [path for path in mapped if not list(TREE.glob(path))] == []
    top_level = {f"{name.partition('/')[0]}/" for name in tracked() if "/" in name and not name.startswith(".")}
    packages = {f"{path.parent.relative_to(TREE).as_posix()}/" for path in (TREE / "zcore").glob("*/__init__.py")}
    assert sorted((top_level | packages) - set(mapped) - {"zcore/"}) == []
    modules = [
        path.relative_to(TREE).as_posix() for path in (TREE / "zcore").glob("*.py") if path.name != "__init__.py"
    ]
    assert [path for path in sorted(modules) if path not in mapped] == []


DOCUMENTS = [
    name
    for name in subprocess.run(["git", "ls-files", "*.md"], cwd=TREE, capture_output=True, text=True).stdout.split()
    if not name.startswith("templates/") and name != "tests/unit/settings_in_the_wild.md" and (TREE / name).is_file()
]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_in_backticks_exists(document: str) -> None:
    missing = [
        f"{document}:{number}: {path}"
        for number, line in enumerate(prose(document), 1)
        for path in re.findall(r"`([^`\s]+)`", line)
        if is_path(path) and path.partition("::")[0] not in ELSEWHERE and not exists(document, path.partition("::")[0])
    ]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_to_a_file_and_a_heading(document: str) -> None:
    broken = [
        f"{document}:{number}: {target}"
        for number, line in enumerate(prose(document), 1)
        for target in re.findall(r"\]\(([^)\s]+)\)", line)
        if "://" not in target and not leads_somewhere(document, target)
    ]
    assert broken == []


def is_path(text: str) -> bool:
    """Whether a text in backticks is a path of this repository: a known suffix, or a folder of the tree in front."""
    path = text.partition("::")[0]
    if not re.fullmatch(r"[\w.*-]+(?:/[\w.*-]+)*/?", path) or path.startswith(("var/", "*.", ".venv/")):
        return False
    return path.endswith(FILE_SUFFIXES) or path.partition("/")[0] in {name.partition("/")[0] for name in tracked()}


def exists(document: str, path: str) -> bool:
    """Whether the path leads to something from the root of the tree or from the folder of the document."""
    folders = (TREE, (TREE / document).parent)
    return any(list(folder.glob(path.rstrip("/"))) for folder in folders)


def leads_somewhere(document: str, target: str) -> bool:
    path, _, heading = target.partition("#")
    file = (TREE / document).parent / path if path else TREE / document
    return file.exists() and (not heading or heading in headings(file))


def headings(file: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def prose(document: str) -> list[str]:
    """Return the lines of a document, with those of fenced code emptied."""
    text = (TREE / document).read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```", lambda code: "\n" * code[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE).split(
        "\n"
    )


def first_cells(document: Path, heading: str) -> list[str]:
    """Return the first cells of all tables whose first column has this heading."""
    tables = re.findall(
        rf"^\| {heading} \|.*\n\|[-|]+\|\n((?:\|.*\n?)+)", document.read_text(encoding="utf-8"), re.M | re.I
    )
    return [row.split("|")[1] for table in tables for row in table.splitlines()]


@cache
def tracked() -> frozenset[str]:
    """Return the names of the files that git tracks."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=TREE, capture_output=True, text=True, check=True)
    return frozenset(filter(None, listing.stdout.split("\0")))
