"""The page about the command line has every flag of every command, and says of each what its `--help` says."""

import re
from pathlib import Path

import pytest

from zcore.cli import build_parser
from zcore.cli.parser import Parser, parse

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
COMMANDS = ("generate", "encode", "inspect", "templates", "config", "doctor")


def command(name: str) -> Parser:
    words = [] if name == "doctor" else ["x"]
    parser: Parser = parse(build_parser(), [name, *words]).parser
    return parser


def section(name: str) -> str:
    """What stands below the heading of a command."""
    found = re.search(rf"^## `zimage {name}`\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def rows(name: str) -> list[str]:
    """A command's flags as the page has to write them."""
    written: list[str] = []
    for action in dict.fromkeys(command(name).flags.values()):
        names = ", ".join(f"`{one}`" for one in action.option_strings or [str(action.metavar)])
        choices = ", ".join(f"`{one}`" for one in action.choices or ())
        value = f"`{action.metavar}`" if action.metavar and action.option_strings else choices
        written.append(f"| {names} | {value} | {str(action.help).replace('%%', '%')} |")
    return written


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_documented_as_it_is(name: str) -> None:
    """What a command shares with `generate` is said there."""
    explained = [] if name == "generate" else rows("generate")
    shown = [line for line in section(name).splitlines() if line.startswith("| `")]
    assert sorted(shown) == sorted(set(rows(name)) - set(explained))


def test_the_page_names_no_flag_that_does_not_exist() -> None:
    known = {flag for name in COMMANDS for flag in command(name).flags} | {"--help"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", PAGE)) <= known
