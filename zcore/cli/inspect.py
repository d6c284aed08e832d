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
from zcore.imaging.encode import PictureParameters, read_parameters
from zcore.imaging.text.embedding_header import EmbeddingHeader, read_header
from zcore.request import GenerationRequest

ALWAYS_SHOWN = ("prompt", "width", "height", "steps", "seed", "format")

DESCRIPTION = """\
How pictures were made, from the parameters inside PNG, JPEG, WebP and AVIF files; and what embedding files hold.

  zimage inspect output.png
  zimage inspect --json *.png | jq .request.seed"""


def add_to(commands: Commands) -> None:
    """The command with its flags."""
    parser = commands.add_parser(
        "inspect", usage="zimage inspect [--json] FILE ...", help="show how a picture was made", description=DESCRIPTION
    )
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help="Pictures or embedding files.")
    parser.add_argument("--json", action="store_true", help="One line of JSON for each file, for programs.")
    parser.set_defaults(run=run, parser=parser)


def run(said: argparse.Namespace) -> int:
    """Print. A file that is not one of ours is a line on standard error and status 1; the others are shown."""
    status = 0
    for path in said.files:
        found = _found(read_given(path, "FILE"))
        if found is None:
            print(f"zimage: {path}: is neither a picture nor an embedding of this program", file=sys.stderr)
            status = 1
        elif said.json:
            print(json.dumps({"file": str(path), **msgspec.to_builtins(found)}, ensure_ascii=False))
        else:
            print(f"{path}\n{_in_words(found)}")
    return status


def _found(content: bytes) -> PictureParameters | EmbeddingHeader | None:
    """What a file says of itself; None for one that says nothing."""
    parameters = read_parameters(content)
    if parameters is not None:
        return parameters
    try:
        return read_header(content)
    except InvalidRequest:
        return None


def _in_words(found: PictureParameters | EmbeddingHeader) -> str:
    """A line for everything that was decided; of a request, what it leaves as it always is stands at the end."""
    if isinstance(found, EmbeddingHeader):
        return "\n".join([*_lines("origin", found.origin), *_lines("tensors", found.tensors)])
    said, silent = _sorted(found.request)
    return "\n".join(
        [
            *_lines("request", said),
            f"    and as always: {', '.join(silent)}",
            f"  picture {found.index} of its request",
            *_lines("made by", found.made_by),
            *_lines("inputs, by SHA-256", found.inputs),
        ]
    )


def _sorted(request: GenerationRequest) -> tuple[dict[str, Any], list[str]]:
    """The fields that say something, and the names of those that have their default."""
    defaults = msgspec.structs.asdict(GenerationRequest(prompt="any"))
    values = msgspec.structs.asdict(request)
    silent = [name for name, value in values.items() if name not in ALWAYS_SHOWN and value == defaults[name]]
    return {name: value for name, value in values.items() if name not in silent}, silent


def _lines(title: str, values: Any) -> list[str]:
    plain: dict[str, Any] = msgspec.to_builtins(values)
    return [f"  {title}", *(f"    {name}: {_value(value)}" for name, value in plain.items())] if plain else []


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
