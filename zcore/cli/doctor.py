"""`zimage doctor`: report this machine's hardware, whether the model is complete, and whether the model will fit.

Prints text or JSON and exits with 0 if the model fits with these settings, 1 if it does not. Reads no weights,
downloads nothing and allocates nothing on a device. `zcore.imaging.memory_estimate` computes the memory,
`zcore.cli.examination` makes the findings and `zcore.cli.diagnosis` formats them.
"""

import argparse
import json
from pathlib import Path

from zcore.checkpoint.defaults import generation_defaults
from zcore.checkpoint.files import check_layout, locate_local
from zcore.checkpoint.geometry import PlacementLimits
from zcore.cli import setting_flags
from zcore.cli.diagnosis import as_json, as_text
from zcore.cli.parser import Commands
from zcore.cli.request_flags import add_request_flags, given_fields
from zcore.cli.setting_flags import add_setting_flags, chosen_settings
from zcore.errors import CheckpointError, ConfigurationError
from zcore.foreign_text import printable
from zcore.request import SIZE_FIELDS, parse_generation
from zcore.settings import Settings

FIELDS = ("width", "height", *SIZE_FIELDS, "steps", "guidance_scale")
"""Request fields that determine how much memory a generation needs."""

DESCRIPTION = """\
Check this machine before loading anything: its devices, whether the model is complete, and whether it will fit.
Nothing is downloaded.

  zimage doctor                               the current settings on this machine
  zimage doctor --profile rtx3060 --vram 12   a profile on a 12 GiB card, present or not
  zimage doctor --size 2048x2048              a larger image
  zimage doctor --dit-quantization 8bit       other settings

Exit status 0: it fits. 1: it does not fit. 2: the check could not be made."""


def add_to(commands: Commands) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "doctor",
        usage="zimage doctor [FLAGS]",
        help="check what fits this machine, without loading the model",
        description=DESCRIPTION,
    )
    parser.add_argument(
        "--vram", metavar="GIB", type=_size, help="Assume one GPU with this much memory instead of the real ones."
    )
    parser.add_argument(
        "--ram", metavar="GIB", type=_size, help="Assume this much main memory instead of the real amount."
    )
    parser.add_argument(
        "--prompt-tokens",
        metavar="N",
        type=_count,
        default=512,
        help="Length of the prompt to estimate for, in tokens. (default 512)",
    )
    parser.add_argument("--json", action="store_true", help="Print the report as one line of JSON.")
    add_request_flags(parser, FIELDS, prompt_required=False)
    add_setting_flags(parser, setting_flags.ALL)
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the report.

    Raises `ZImageError` if no estimate is possible: settings are invalid, or the checkpoint's configuration is missing.
    """
    settings = chosen_settings(arguments).settings
    request = parse_generation(
        {"prompt": "any", **given_fields(arguments)}, generation_defaults(settings), settings.limits
    )
    folder = _checkpoint_folder(settings)
    limit = PlacementLimits.of_checkpoint(folder).caption_tokens
    if arguments.prompt_tokens > limit:
        raise ConfigurationError(
            f"--prompt-tokens: must be a whole number from 1 to {limit} for this checkpoint, "
            f"not {arguments.prompt_tokens}"
        )
    from zcore.cli.examination import diagnose  # loads torch

    diagnosis = diagnose(arguments, settings, request, folder)
    if arguments.json:
        print(printable(json.dumps(as_json(diagnosis), ensure_ascii=False)))
    else:
        print("\n".join(map(printable, as_text(diagnosis))))
    return 0 if diagnosis.estimate.fits else 1


def _checkpoint_folder(settings: Settings) -> Path:
    """Return the checkpoint's folder. Raises `CheckpointError` if it lacks configuration files."""
    folder = locate_local(settings.model_location)
    if folder is None:
        raise CheckpointError(
            f"model_path: {settings.model_path} is neither a folder nor in the Hugging Face cache, and `zimage doctor` "
            "downloads nothing; download at least the checkpoint's configuration files"
        )
    check_layout(folder, [])
    return folder


def _size(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < 1_000_000:
        raise argparse.ArgumentTypeError(f"must be a number of GiB above 0, not `{text}`")
    return size


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not `{text}`")
    return int(text)
