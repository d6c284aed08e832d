"""The command line: `zimage generate | encode | inspect | templates | config | doctor`.

Takes the arguments of a terminal; gives pictures as files, text on standard output, and an exit status: 0 done, 2 the
caller's mistake, 1 any other failure, 130 stopped by Ctrl-C. A failure is one line on standard error. Nothing heavy is
loaded before the arguments are known to be right. Does not know the service: no queue, no database, no HTTP.
"""

import os
import sys
from collections.abc import Sequence

from zcore.cli import config, doctor, encode, generate, inspect, templates
from zcore.cli.parser import Parser, parse
from zcore.cli.request_flags import in_flags
from zcore.errors import CheckpointError, ConfigurationError, InvalidRequest, ZImageError

CALLERS_MISTAKES = (InvalidRequest, ConfigurationError, CheckpointError)
STOPPED = 130  # 128 + SIGINT, as a shell counts it

DESCRIPTION = """\
Pictures from words, on this machine.

  zimage generate "A cat sleeping in sunlight"          one picture: output.png
  zimage generate --seed 42 --size 1536x1024 "A city"   the same one every time
  zimage inspect output.png                             how a picture was made
  zimage generate --from output.png                     make it again
  zimage templates --search watercolor                  styles by name
  zimage config --profile demo                          what is set, and where
  zimage doctor --vram 12                               what fits a card of 12 GB

Without a GPU or a download: `--profile demo` paints with the miniature that ships with the source."""

EPILOG = "`zimage COMMAND --help` explains one command. Everything at length: docs/cli.md."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line, that of the process where none is given; the exit status."""
    try:
        said = parse(build_parser(), sys.argv[1:] if arguments is None else arguments)
        status = int(said.run(said))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return STOPPED
    except BrokenPipeError:
        # Whoever read has seen enough. What is still buffered has nowhere to go, at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except InvalidRequest as fault:
        return _failed(in_flags(fault), 2)
    except ZImageError as fault:
        return _failed(fault.message, 2 if isinstance(fault, CALLERS_MISTAKES) else 1)


def build_parser() -> Parser:
    """Every command with its flags."""
    parser = Parser(prog="zimage", description=DESCRIPTION, epilog=EPILOG)
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True, title="commands")
    for command in (generate, encode, inspect, templates, config, doctor):
        command.add_to(commands)
    return parser


def _failed(message: str, status: int) -> int:
    print(f"zimage: {' '.join(message.split())}", file=sys.stderr)
    return status
