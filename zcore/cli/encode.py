"""`zimage encode`: a prompt as a file, to paint from elsewhere.

Takes a command line; gives one embedding file. Loads the text encoder and nothing else of the checkpoint.
"""

import argparse
import sys
from pathlib import Path

from zcore.cli import setting_flags
from zcore.cli.commission import check_template
from zcore.cli.files import check_place, whole_file
from zcore.cli.parser import Commands
from zcore.cli.progress import ProgressLine
from zcore.cli.request_flags import TEXT_FIELDS, add_request_flags, said_fields
from zcore.cli.setting_flags import add_setting_flags, chosen_settings
from zcore.imaging.from_settings import load_encoder
from zcore.request import parse_generation

DESCRIPTION = """\
Turn a prompt into an embedding, on a machine that needs no GPU; `zimage generate --embeddings` paints from it on
another, which needs no text encoder.

  zimage encode "A cat sleeping in sunlight" --output cat.safetensors
  zimage generate --embeddings cat.safetensors --seed 42

With --guidance-scale above 0 the negative prompt is encoded with it, which guided pictures need."""


def add_to(commands: Commands) -> None:
    """The command with its flags."""
    parser = commands.add_parser(
        "encode",
        usage="zimage encode [FLAGS] PROMPT",
        help="turn a prompt into an embedding file",
        description=DESCRIPTION,
    )
    add_request_flags(parser, (*TEXT_FIELDS, "guidance_scale"), prompt_required=True)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--output",
        metavar="PATH",
        type=Path,
        default=Path("embedding.safetensors"),
        help="Where the embedding goes. (default embedding.safetensors)",
    )
    flags = (
        *setting_flags.CHECKPOINT,
        *setting_flags.TEMPLATES,
        *setting_flags.ENCODER,
    )
    add_setting_flags(parser, flags)
    parser.set_defaults(run=run, parser=parser)


def run(said: argparse.Namespace) -> int:
    """Encode and write. Raises `ZImageError`."""
    chosen = chosen_settings(said)
    request = parse_generation(said_fields(said), chosen.settings.generation_defaults)
    check_template(request, chosen.settings)
    check_place(said.output)
    with ProgressLine(sys.stderr, pictures=1) as line:
        line.say("loading the text encoder ...")
        embedding = load_encoder(chosen.settings).encode(request)
        with whole_file(said.output) as place:
            embedding.save(place)
    print(f"{said.output}  {embedding.prompt_tokens} tokens")
    return 0
