"""An argparse parser that raises one-line errors and suggests the flag that was probably meant.

Defines no flags of its own.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from zcore.errors import ConfigurationError, did_you_mean

Commands = Any
"""The object that `add_subparsers` returns; argparse has no public name for its class."""


class Parser(argparse.ArgumentParser):
    """A parser that raises instead of printing its usage, and accepts no abbreviated flags."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options, allow_abbrev=False)
        self.hints: Mapping[str, str] = {}
        """What to say about flags of other commands that this one does not have."""
        self.commands: Sequence[str] = ()
        """The commands of which one must be given, if any."""

    def error(self, message: str) -> NoReturn:
        """Raise argparse's complaint as a `ConfigurationError`."""
        raise ConfigurationError(message.removeprefix("argument "))

    @property
    def flags(self) -> dict[str, argparse.Action]:
        """Every argument by its flags, and positional arguments by their metavar."""
        actions = [action for action in self._actions if action.dest != "help"]
        return {name: action for action in actions for name in action.option_strings or [str(action.metavar)]}


def parse(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """Return the parsed arguments.

    Raises `ConfigurationError`, which for an unknown command or flag suggests the nearest one.
    """
    if arguments and parser.commands and not arguments[0].startswith("-") and arguments[0] not in parser.commands:
        hint = did_you_mean(arguments[0], parser.commands)
        raise ConfigurationError(f"`{arguments[0]}` is not a command ({', '.join(parser.commands)}){hint}")
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise ConfigurationError(_unknown_argument(unknown[0], parsed.parser))
    return parsed


def _unknown_argument(argument: str, command: Parser) -> str:
    if not argument.startswith("-"):
        return f"unexpected argument `{argument}`; put a text of several words in quotes"
    flag = argument.partition("=")[0]
    return f"{flag}: {command.hints.get(flag) or f'unknown flag{did_you_mean(flag, command.flags)}'}"
