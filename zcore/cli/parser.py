"""argparse as this command line wants it: one line for a wrong use, and the flag that was probably meant.

Takes arguments; gives what they say, or a `ConfigurationError`. Does not know any flag.
"""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from zcore.errors import ConfigurationError, did_you_mean

Commands = Any
"""What argparse gives to add commands to; its class has no public name."""


class Parser(argparse.ArgumentParser):
    """A parser that raises instead of printing its usage, and takes no abbreviated flags."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """What argparse found wrong, as an error of ours."""
        raise ConfigurationError(message.removeprefix("argument "))

    @property
    def flags(self) -> dict[str, argparse.Action]:
        """Every flag, and positionals by their names."""
        actions = [action for action in self._actions if action.dest != "help"]
        return {name: action for action in actions for name in action.option_strings or [str(action.metavar)]}


def parse(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """What is said. Raises `ConfigurationError`, for a flag that does not exist with the nearest that does."""
    said, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise ConfigurationError(_unknown(unknown[0], said.parser))
    return said


def _unknown(argument: str, command: Parser) -> str:
    if not argument.startswith("-"):
        return f"`{argument}` is one argument too many; put what belongs together into quotes"
    flag = argument.partition("=")[0]
    return f"{flag}: there is no such flag{did_you_mean(flag, command.flags)}"
