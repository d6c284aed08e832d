"""docs/cli.md documents every flag of every command with the text of its `--help`."""

import re
from pathlib import Path

import pytest

from zcore.cli import build_parser
from zcore.cli.parser import Parser, parse

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
COMMANDS = build_parser().commands


def command(name: str) -> Parser:
    words = {"doctor": [], "c2pa-certificate": [], "benchmark": ["attention"]}.get(name, ["x"])
    parser: Parser = parse(build_parser(), [name, *words]).parser
    return parser


def section(name: str) -> str:
    """Return the text below the heading of a command."""
    found = re.search(rf"^## `zimage {name}`\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def rows(name: str) -> list[str]:
    """Return the table rows that the page must have for a command."""
    expected: list[str] = []
    for action in dict.fromkeys(command(name).flags.values()):
        names = ", ".join(f"`{one}`" for one in action.option_strings or [str(action.metavar)])
        choices = ", ".join(f"`{one}`" for one in action.choices or ())
        value = f"`{action.metavar}`" if action.metavar and action.option_strings else choices
        expected.append(f"| {names} | {value} | {str(action.help).replace('%%', '%')} |")
    return expected


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_documented_with_its_help_text(name: str) -> None:
    """Flags that a command shares with `generate` are documented there only."""
    documented_elsewhere = [] if name == "generate" else rows("generate")
    shown = [line for line in section(name).splitlines() if line.startswith("| `")]
    assert sorted(shown) == sorted(set(rows(name)) - set(documented_elsewhere))


def test_the_page_names_only_flags_that_exist() -> None:
    known = {flag for name in COMMANDS for flag in command(name).flags} | {"--help", "--version"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", PAGE)) <= known
