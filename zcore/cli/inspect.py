"""`zimage inspect`: show how images were made and what embedding files contain.

Prints text or JSON. Needs no torch and decodes no pixels.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from zcore.cli.files import read_file
from zcore.cli.parser import Commands
from zcore.errors import InvalidRequest
from zcore.foreign_text import printable
from zcore.image_files.content_credentials import Credentials, credentials_in
from zcore.image_files.writing import ImageParameters, read_parameters
from zcore.prompt.embedding_header import EmbeddingHeader, read_header
from zcore.request import GenerationRequest

ALWAYS_SHOWN = ("prompt", "width", "height", "steps", "seed", "format")

DESCRIPTION = """\
Show how images were made, from the parameters stored in PNG, JPEG, WebP and AVIF files, and what embedding files
contain.

  zimage inspect output.png
  zimage inspect --json *.png | jq .request.seed"""


def add_to(commands: Commands) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "inspect", usage="zimage inspect [--json] FILE ...", help="show how an image was made", description=DESCRIPTION
    )
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help="Image or embedding files.")
    parser.add_argument("--json", action="store_true", help="Print one line of JSON for each file.")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the parameters of each file.

    A file without parameters is reported on standard error and makes the status 1; the other files are still shown.
    """
    status = 0
    for path in arguments.files:
        file = read_file(path, "FILE")
        content = _parameters_in(file)
        credentials = credentials_in(file) if isinstance(content, ImageParameters) else None
        if content is None:
            print(
                f"zimage: {printable(str(path))}: is neither an image nor an embedding written by zimage",
                file=sys.stderr,
            )
            status = 1
        elif arguments.json:
            signature = {"credentials": msgspec.to_builtins(credentials)} if credentials else {}
            shown = {"file": str(path), **msgspec.to_builtins(content), **signature}
            print(printable(json.dumps(shown, ensure_ascii=False)))
        else:
            signed = [f"  {printable(_signature(credentials))}"] if isinstance(content, ImageParameters) else []
            print("\n".join([printable(str(path)), _as_text(content), *signed]))
    return status


def _parameters_in(content: bytes) -> ImageParameters | EmbeddingHeader | None:
    parameters = read_parameters(content)
    if parameters is not None:
        return parameters
    try:
        return read_header(content)
    except InvalidRequest:
        return None


def _as_text(content: ImageParameters | EmbeddingHeader) -> str:
    """Format one value per line; request fields that have their default value are only named, after the others."""
    if isinstance(content, EmbeddingHeader):
        return "\n".join([*_lines("origin", content.origin), *_lines("tensors", content.tensors)])
    set_fields, default_fields = _split_by_default(content.request)
    return "\n".join(
        [
            *_lines("request", set_fields),
            f"    default: {', '.join(default_fields)}",
            f"  image {content.index} of its request",
            *_lines("made by", content.made_by),
            *_lines("inputs, by SHA-256", content.inputs),
        ]
    )


def _signature(credentials: Credentials | None) -> str:
    if credentials is None:
        return "not signed"
    if credentials.state == "invalid":
        return f"signed by {credentials.signed_by} ({credentials.issuer}), but changed afterwards"
    trust = "on a trust list" if credentials.state == "trusted" else "not on a trust list"
    return f"signed by {credentials.signed_by} ({credentials.issuer}); signature valid, signer {trust}"


def _split_by_default(request: GenerationRequest) -> tuple[dict[str, Any], list[str]]:
    """Return the fields worth showing, and the names of those that have their default value."""
    defaults = msgspec.structs.asdict(GenerationRequest(prompt="any"))
    values = msgspec.structs.asdict(request)
    hidden = [name for name, value in values.items() if name not in ALWAYS_SHOWN and value == defaults[name]]
    return {name: value for name, value in values.items() if name not in hidden}, hidden


def _lines(title: str, values: Any) -> list[str]:
    plain: dict[str, Any] = msgspec.to_builtins(values)
    return (
        [f"  {title}", *(f"    {printable(name)}: {printable(_value(value))}" for name, value in plain.items())]
        if plain
        else []
    )


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
