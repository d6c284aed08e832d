"""Command line: `zimage COMMAND`, with one module for each command.

Writes images to files and text to standard output. The exit status is 0 on success, 2 for a mistake in the command line
or the configuration, 1 for any other failure and 130 after Ctrl-C. A failure is reported in one line on standard error.
The arguments are validated before torch is imported. Independent of the service: no queue, no database, no HTTP.
"""

import os
import sys
from collections.abc import Sequence
from importlib import metadata

from zcore.cli import benchmark, c2pa_certificate, config, doctor, encode, generate, inspect, profile, templates
from zcore.cli.parser import Parser, parse
from zcore.cli.request_flags import describe_errors
from zcore.errors import CheckpointError, ConfigurationError, InvalidRequest, ZImageError
from zcore.foreign_text import printable

USAGE_ERRORS = (InvalidRequest, ConfigurationError, CheckpointError)
INTERRUPTED = 130  # 128 + SIGINT, the shell convention

DESCRIPTION = """\
Generate images from text on this machine.

  zimage generate "A cat sleeping in sunlight"          write one image to output.png
  zimage generate --seed 42 --size 1536x1024 "A city"   choose the seed and the size
  zimage inspect output.png                             show how an image was made
  zimage generate --from output.png                     make the same image again
  zimage templates --search watercolor                  find a style
  zimage config --profile demo                          show the settings and their sources
  zimage doctor --vram 12                               check what fits on a 12 GiB card
  zimage profile --sweep                                find the fastest configuration of this machine

No GPU and no model at hand? `--profile demo` uses the miniature model that ships with the source."""

EPILOG = "Run `zimage COMMAND --help` for the flags of one command. Full documentation: docs/cli.md."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status. `None` means the arguments of this process."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        parser = build_parser()
        if given in ([], ["help"]):
            parser.print_help()
            return 0
        parsed = parse(parser, given)
        status = int(parsed.run(parsed))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader closed the pipe. Discard the rest of the buffer, which Python would otherwise flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except InvalidRequest as error:
        return _fail(describe_errors(error), 2)
    except ZImageError as error:
        return _fail(error.message, 2 if isinstance(error, USAGE_ERRORS) else 1)


def build_parser() -> Parser:
    """Return the parser with every command and its flags."""
    parser = Parser(prog="zimage", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"zimage {metadata.version('zimage')}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True, title="commands")
    for command in (generate, encode, inspect, templates, config, doctor, profile, benchmark, c2pa_certificate):
        command.add_to(commands)
    parser.commands = tuple(commands.choices)
    return parser


def _fail(message: str, status: int) -> int:
    print(f"zimage: {printable(' '.join(message.split()))}", file=sys.stderr)
    return status
