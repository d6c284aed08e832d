"""`zimage doctor`: what this machine has, whether the model is there, and what of it fits before it is loaded.

Takes a command line; gives a report, for people or as JSON, and status 0 where the settings' model fits, 1 where it
does not. Loads no weight, downloads nothing and allocates nothing on a device. What a picture takes is `memory`'s to
say, and how it is told is `diagnosis`'s.
"""

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from zcore.cli import setting_flags
from zcore.cli.diagnosis import Checked, Diagnosis, ProfileFit, as_json, gib, in_words, why
from zcore.cli.parser import Commands
from zcore.cli.request_flags import add_request_flags, said_fields
from zcore.cli.setting_flags import add_setting_flags, chosen_settings
from zcore.errors import CheckpointError, ConfigurationError, ZImageError
from zcore.imaging.geometry import PlacementLimits
from zcore.imaging.model.checkpoint import check_layout, check_whole, locate_here
from zcore.imaging.text.templates import TemplateLibrary
from zcore.imaging.text.token_count import TokenCounter
from zcore.request import SIZE_FIELDS, GenerationRequest, parse_generation
from zcore.settings import Settings, load_settings, profile_names

if TYPE_CHECKING:
    from zcore.cli.machine import Machine
    from zcore.imaging.model.loader import Networks
    from zcore.imaging.model.memory import Painting

FIELDS = ("width", "height", *SIZE_FIELDS, "steps", "guidance_scale")
"""What of a request decides how much memory it takes."""

DESCRIPTION = """\
What this machine has, whether the model is whole, and what fits; before anything is loaded. Nothing is downloaded.

  zimage doctor                               the settings in force, on this machine
  zimage doctor --profile rtx3060 --vram 12   a profile, on a card that is not here
  zimage doctor --size 2048x2048              a larger picture
  zimage doctor --dit-quantization 8bit       other settings

Status 0: it fits. 1: it does not."""


def add_to(commands: Commands) -> None:
    """The command with its flags."""
    parser = commands.add_parser(
        "doctor",
        usage="zimage doctor [FLAGS]",
        help="tell what fits this machine, before loading",
        description=DESCRIPTION,
    )
    parser.add_argument("--vram", metavar="GIB", type=_size, help="Pretend one card with so much memory.")
    parser.add_argument("--ram", metavar="GIB", type=_size, help="Pretend so much memory of the CPU.")
    parser.add_argument(
        "--prompt-tokens",
        metavar="N",
        type=_count,
        default=512,
        help="Length of the prompt that is counted with. (default 512)",
    )
    parser.add_argument("--json", action="store_true", help="One line of JSON, for programs.")
    add_request_flags(parser, FIELDS, prompt_required=False)
    add_setting_flags(parser, setting_flags.ALL)
    parser.set_defaults(run=run, parser=parser)


def run(said: argparse.Namespace) -> int:
    """Print. Raises `ZImageError` where nothing can be told: wrong settings, no configuration of a checkpoint."""
    settings = chosen_settings(said).settings
    request = parse_generation({"prompt": "any", **said_fields(said)}, settings.generation_defaults)
    found = _diagnosed(said, settings, request)
    if said.json:
        print(json.dumps(as_json(found), ensure_ascii=False))
    else:
        print("\n".join(in_words(found)))
    return 0 if found.estimate.fits else 1


def _diagnosed(said: argparse.Namespace, settings: Settings, request: GenerationRequest) -> Diagnosis:
    folder = _configurations(settings)
    if said.prompt_tokens > (limit := PlacementLimits.of_checkpoint(folder).caption_tokens):
        raise ConfigurationError(f"--prompt-tokens: {said.prompt_tokens}; this checkpoint places at most {limit}")
    from zcore.cli.machine import this_machine
    from zcore.imaging.from_settings import memory_parts
    from zcore.imaging.model.loader import build_meta
    from zcore.imaging.model.memory import estimate, largest_square
    from zcore.imaging.model.quantization import quiet_imports

    machine = this_machine(said.vram, said.ram)
    painting = _painting(settings, request, said.prompt_tokens)
    with quiet_imports():
        networks = build_meta(folder)
    try:
        parts = memory_parts(settings, folder, machine.device_of)
    except CheckpointError as fault:
        is_missing = fault.message.startswith("device:") and not machine.pretends
        hint = "; --vram 24 pretends a card" if is_missing else ""
        raise CheckpointError(f"{fault.message}{hint}") from fault
    found = estimate(networks, parts, painting, machine.memory_bytes)
    return Diagnosis(
        machine=machine,
        checked=tuple(_checked(settings, folder)),
        painting=painting,
        estimate=found,
        why=why(found),
        largest_square_px=largest_square(networks, parts, painting, machine.memory_bytes),
        profiles=tuple(_profiles(said, machine, networks, folder, request)),
    )


def _configurations(settings: Settings) -> Path:
    """The checkpoint's folder with at least its configurations."""
    folder = locate_here(settings.model_location)
    if folder is None:
        raise CheckpointError(
            f"model_path: {settings.model_path} is neither a folder nor in the hub's cache, and nothing is downloaded "
            "here; its configurations are enough to tell what fits"
        )
    check_layout(folder, [])
    return folder


def _painting(settings: Settings, request: GenerationRequest, prompt_tokens: int) -> "Painting":
    from zcore.imaging.model.memory import Painting
    from zcore.imaging.model.tiling import Tiling

    return Painting(
        width_px=request.width,
        height_px=request.height,
        prompt_tokens=prompt_tokens,
        steps=request.steps,
        batch_size=settings.pytorch.batch_size,
        guided=request.is_guided,
        tiled=settings.pytorch.tiled_vae,
        tiling=Tiling(settings.pytorch.tile_size, settings.pytorch.tile_overlap),
    )


def _checked(settings: Settings, folder: Path) -> list[Checked]:
    files = {
        "text_encoder": settings.encoder_weights,
        "transformer": settings.dit_weights,
        "vae": settings.vae_weights,
    }
    own = [component for component, file in files.items() if file is None]
    return [
        _check("checkpoint", settings.model_path, lambda: check_whole(folder, own)),
        *(_check(f"{name}, single file", str(file), file.stat) for name, file in files.items() if file is not None),
        _check("tokenizer", "there", lambda: TokenCounter.load(folder)),
        _check("templates", "readable", lambda: TemplateLibrary.load(*settings.templates_paths)),
        _place_for_pictures(settings),
    ]


def _check(name: str, found: str, look: Callable[[], object]) -> Checked:
    try:
        look()
    except ZImageError as fault:
        return Checked(name, found, fault.message)
    except OSError as fault:
        return Checked(name, found, fault.strerror)
    return Checked(name, found)


def _place_for_pictures(settings: Settings) -> Checked:
    if settings.storage.bucket:
        return Checked("pictures of the service", f"bucket {settings.storage.bucket}")
    folder = next(path for path in (settings.data_path, *settings.data_path.parents) if path.is_dir())
    return Checked("disk for pictures", f"{gib(shutil.disk_usage(folder).free)} free")


def _profiles(
    said: argparse.Namespace, machine: "Machine", networks: "Networks", folder: Path, request: GenerationRequest
) -> list[ProfileFit]:
    """The profiles of the settings file that use a card, the one that takes the most first; none without a card."""
    from zcore.imaging.from_settings import memory_parts
    from zcore.imaging.model.memory import estimate

    fits: list[ProfileFit] = []
    if not any(device.name == "cuda" for device in machine.devices):
        return fits
    for name in profile_names(os.environ, said.config):
        settings = load_settings(os.environ, {"profile": name}, said.config)
        try:
            painting = _painting(settings, request, said.prompt_tokens)
            parts = memory_parts(settings, folder, machine.device_of)
        except CheckpointError as fault:
            fits.append(ProfileFit(name, 0, fault.message))
            continue
        found = estimate(networks, parts, painting, machine.memory_bytes)
        cards = [device.peak_bytes for device in found.devices if device.device.startswith("cuda")]
        fits += [ProfileFit(name, max(cards), None if found.fits else why(found))] if cards else []
    return sorted(fits, key=lambda fit: -fit.peak_bytes)


def _size(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < 1_000_000:
        raise argparse.ArgumentTypeError(f"must be GiB above 0, not `{text}`")
    return size


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, not `{text}`")
    return int(text)
