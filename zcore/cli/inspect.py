"""`zimage inspect`: how a picture was made, and what an embedding holds.

Takes files; gives their parameters, for people or as JSON. Needs no torch and decodes no pixels.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from zcore.cli.files import read_given
from zcore.cli.parser import Commands
from zcore.errors import InvalidRequest
from zcore.imaging.encode import read_parameters
from zcore.request import GenerationRequest

DESCRIPTION = """\
How pictures were made, from the parameters inside PNG, JPEG, WebP and AVIF files; and what embedding files hold.

  zimage inspect output.png
  zimage inspect --json *.png | jq .request.seed"""


def add_to(commands: Commands) -> None:
    """The command with its flags."""
    parser = commands.add_parser("inspect", help="show how a picture was made", description=DESCRIPTION)
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help="Pictures or embedding files.")
    parser.add_argument("--json", action="store_true", help="One line of JSON for each file, for programs.")
    parser.set_defaults(run=run, parser=parser)


def run(said: argparse.Namespace) -> int:
    """Print. A file that is not one of ours is a line on standard error and status 1; the others are shown."""
    status = 0
    for path in said.files:
        found = _found(path)
        if found is None:
            print(f"zimage: {path}: is neither a picture nor an embedding of this program", file=sys.stderr)
            status = 1
        elif said.json:
            print(json.dumps({"file": str(path), **found}, ensure_ascii=False))
        else:
            print(_in_words(path, found))
    return status
