"""The page about the command line has every flag of every command, and says of each what its `--help` says."""

import re
from pathlib import Path

import pytest

from zcore.cli import build_parser
from zcore.cli.parser import Parser, parse

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
COMMANDS = ("generate", "encode", "inspect", "templates", "config")
SHARED = ("--config", "--profile", "--set", "--model-path", "--templates-dir")
"""Explained once, below `generate`."""


def command(name: str) -> Parser:
    return parse(build_parser(), [name, "x"]).parser


def section(name: str) -> str:
    """What stands below the heading of a command."""
    found = re.search(
        rf"^## `zimage {name}`\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert found is not None
    return found[1]


def rows(name: str) -> list[str]:
    """The rows of a command's tables as they have to be."""
    written: list[str] = []
    for action in command(name)._actions:
        if action.dest == "help" or (
            name != "generate" and action.option_strings[:1] and action.option_strings[0] in SHARED
        ):
            continue
        names = ", ".join(f"`{one}`" for one in action.option_strings or [str(action.metavar)])
        value = "" if not action.option_strings or action.nargs == 0 else str(action.metavar or "")
        if action.choices:
            value = ", ".join(f"`{one}`" for one in action.choices)
        elif value:
            value = f"`{value}`"
        meaning = str(action.help).replace("%%", "%").replace("|", r"\|")
        written.append(f"| {names} | {value} | {meaning} |")
    return written


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_documented_as_it_is(name: str) -> None:
    shown = [line for line in section(name).splitlines() if line.startswith("| `")]
    assert sorted(shown) == sorted(rows(name))


def test_the_page_names_no_flag_that_does_not_exist() -> None:
    known = {flag for name in COMMANDS for flag in command(name).flags} | {"--help"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", PAGE.read_text(encoding="utf-8"))) <= known
