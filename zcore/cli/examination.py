"""The findings of `zimage doctor`: the machine, the checks, and the memory that the settings and profiles need.

Importing this module loads torch. Reads no weights and allocates nothing on a device.
"""

import argparse
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from zcore.checkpoint.files import check_complete
from zcore.cli.diagnosis import Check, Diagnosis, ProfileFit, gib, reason_of
from zcore.cli.machine import Machine, inspect_machine
from zcore.errors import CheckpointError, ConfigurationError, ZImageError
from zcore.imaging.from_settings import memory_parts
from zcore.imaging.memory_estimate import GenerationShape, estimate, largest_square
from zcore.imaging.network.tiling import Tiling
from zcore.imaging.weights.library_modules import quiet_imports
from zcore.imaging.weights.loader import Networks, build_meta
from zcore.prompt.templates import TemplateLibrary
from zcore.prompt.token_count import TokenCounter
from zcore.request import GenerationRequest
from zcore.settings import Settings, load_settings, profile_names


def diagnose(arguments: argparse.Namespace, settings: Settings, request: GenerationRequest, folder: Path) -> Diagnosis:
    """Return the findings for these settings and this request; `folder` is the checkpoint's.

    `arguments` has `vram`, `ram`, `prompt_tokens` and `config`. Raises `CheckpointError`.
    """
    machine = inspect_machine(arguments.vram, arguments.ram)
    generation = _generation_shape(settings, request, arguments.prompt_tokens)
    with quiet_imports():
        networks = build_meta(folder)
    try:
        parts = memory_parts(settings, folder, machine.device_of)
    except CheckpointError as error:
        is_missing_device = error.message.startswith("device:") and not machine.assumes_gpu
        hint = "; add --vram 24 to assume a 24 GiB GPU" if is_missing_device else ""
        raise CheckpointError(f"{error.message}{hint}") from error
    memory = estimate(networks, parts, generation, machine.memory_bytes)
    return Diagnosis(
        machine=machine,
        checks=tuple(_run_checks(settings, folder)),
        generation=generation,
        estimate=memory,
        reason=reason_of(memory),
        largest_square_px=largest_square(networks, parts, generation, machine.memory_bytes, settings.limits.max_pixels),
        profiles=tuple(_profile_fits(arguments, machine, networks, folder, request)),
    )


def _generation_shape(settings: Settings, request: GenerationRequest, prompt_tokens: int) -> GenerationShape:
    return GenerationShape(
        width_px=request.width,
        height_px=request.height,
        prompt_tokens=prompt_tokens,
        steps=request.steps,
        batch_size=settings.pytorch.batch_size,
        guided=request.is_guided,
        tiled=settings.pytorch.tiled_vae,
        tiling=Tiling(settings.pytorch.tile_size, settings.pytorch.tile_overlap),
    )


def _run_checks(settings: Settings, folder: Path) -> list[Check]:
    files = {
        "text_encoder": settings.encoder_weights,
        "transformer": settings.dit_weights,
        "vae": settings.vae_weights,
    }
    from_checkpoint = [component for component, file in files.items() if file is None]
    return [
        _check("checkpoint", settings.model_path, lambda: check_complete(folder, from_checkpoint)),
        *(_check(f"{name}, single file", str(file), file.stat) for name, file in files.items() if file is not None),
        _check("tokenizer", "found", lambda: TokenCounter.load(folder)),
        _check("templates", "readable", lambda: TemplateLibrary.load(*settings.templates_paths)),
        _storage_check(settings),
    ]


def _check(name: str, found: str, attempt: Callable[[], object]) -> Check:
    try:
        attempt()
    except ZImageError as error:
        return Check(name, found, error.message)
    except OSError as error:
        return Check(name, found, error.strerror)
    return Check(name, found)


def _storage_check(settings: Settings) -> Check:
    if settings.storage.bucket:
        return Check("storage of the service", f"bucket {settings.storage.bucket}")
    folder = next(path for path in (settings.data_path, *settings.data_path.parents) if path.is_dir())
    return Check("disk space for images", f"{gib(shutil.disk_usage(folder).free)} free")


def _profile_fits(
    arguments: argparse.Namespace, machine: Machine, networks: Networks, folder: Path, request: GenerationRequest
) -> list[ProfileFit]:
    """Return the memory that each profile which uses a GPU needs, largest first; empty if there is no GPU."""
    fits: list[ProfileFit] = []
    if not any(device.name == "cuda" for device in machine.devices):
        return fits
    for name in profile_names(os.environ, arguments.config):
        try:
            settings = load_settings(os.environ, {"profile": name}, arguments.config)
            generation = _generation_shape(settings, request, arguments.prompt_tokens)
            parts = memory_parts(settings, folder, machine.device_of)
        except (CheckpointError, ConfigurationError) as error:
            fits.append(ProfileFit(name, 0, error.message))
            continue
        memory = estimate(networks, parts, generation, machine.memory_bytes)
        peaks = [device.peak_bytes for device in memory.devices if device.device.startswith("cuda")]
        fits += [ProfileFit(name, max(peaks), None if memory.fits else reason_of(memory))] if peaks else []
    return sorted(fits, key=lambda fit: -fit.peak_bytes)
