"""`zimage encode`: encode a prompt into an embedding file, from which another machine can generate.

Loads only the text encoder of the checkpoint.
"""

import argparse
import sys
from pathlib import Path

from zcore.checkpoint.defaults import generation_defaults
from zcore.cli import setting_flags
from zcore.cli.files import atomic_write, check_output_path
from zcore.cli.invocation import check_template
from zcore.cli.model_files import check_gpu, check_model_files
from zcore.cli.parser import Commands
from zcore.cli.progress import ProgressLine
from zcore.cli.request_flags import TEXT_FIELDS, add_request_flags, given_fields
from zcore.cli.setting_flags import add_setting_flags, chosen_settings
from zcore.request import parse_generation

DESCRIPTION = """\
Encode a prompt into an embedding file. This needs no GPU. `zimage generate --embeddings` reads the file on another
machine, which then needs no text encoder.

  zimage encode "A cat sleeping in sunlight" --output cat.safetensors
  zimage generate --embeddings cat.safetensors --seed 42

With --guidance-scale above 0 the negative prompt is encoded too, as guided generation requires."""


def add_to(commands: Commands) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "encode",
        usage="zimage encode [FLAGS] PROMPT",
        help="encode a prompt into an embedding file",
        description=DESCRIPTION,
    )
    add_request_flags(parser, (*TEXT_FIELDS, "guidance_scale"), prompt_required=True)
    files = parser.add_argument_group("files")
    files.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        type=Path,
        default=Path("embedding.safetensors"),
        help="File to write the embedding to. (default embedding.safetensors)",
    )
    add_setting_flags(parser, (*setting_flags.CHECKPOINT, *setting_flags.TEMPLATES, *setting_flags.ENCODER))
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Encode the prompt and write the file. Raises `ZImageError` if either fails."""
    chosen = chosen_settings(arguments)
    request = parse_generation(given_fields(arguments), generation_defaults(chosen.settings))
    check_template(request, chosen.settings)
    check_output_path(arguments.output)
    check_gpu(chosen.settings, ["text_encoder"])
    check_model_files(arguments, chosen.settings, ["text_encoder"])
    from zcore.imaging.from_settings import load_encoder  # loads torch, so only once the arguments are valid

    with ProgressLine(sys.stderr, images=1) as line:
        line.show("loading the text encoder ...")
        embedding = load_encoder(chosen.settings).encode(request)
        with atomic_write(arguments.output) as path:
            embedding.save(path)
    print(f"{arguments.output}  {embedding.prompt_tokens} tokens")
    return 0
