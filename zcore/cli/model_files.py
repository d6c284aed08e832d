"""Whether the GPU and the model files that the settings name exist, checked before torch is imported.

Errors name the flag if one was used, otherwise the setting. Reads no weights and downloads nothing.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from zcore.checkpoint import requirements
from zcore.checkpoint.files import UNKNOWN_MODEL, check_layout, is_hub_id, locate_local
from zcore.cli.setting_flags import ALL
from zcore.errors import CheckpointError, ConfigurationError
from zcore.settings import Settings

WEIGHTS_SETTINGS = {
    "text_encoder": "encoder.weights_file",
    "transformer": "pipeline.weights_file",
    "vae": "pipeline.vae_weights_file",
}
"""The setting that names a single file with the weights of a component."""


def check_gpu(settings: Settings, components: Sequence[str]) -> None:
    """Raise `ConfigurationError`, with all that is missing and the ways out, if a component needs a GPU in vain."""
    if requirements.missing_gpu(settings, components):
        raise ConfigurationError("; ".join([*requirements.missing(settings), *requirements.ways_out(settings.profile)]))


def check_model_files(arguments: argparse.Namespace, settings: Settings, components: Sequence[str]) -> None:
    """Raise `CheckpointError` if a file of these components, or a LoRA file, is missing.

    A model that has to be downloaded first is not checked.
    """
    files = {"text_encoder": settings.encoder_weights, "transformer": settings.dit_weights, "vae": settings.vae_weights}
    single = {name: file for name, file in files.items() if name in components and file is not None}
    for component, file in single.items():
        _check_file(_name_of(arguments, WEIGHTS_SETTINGS[component]), file)
    for file, _scale in settings.fused_loras if "transformer" in components else ():
        _check_file("--lora" if vars(arguments).get("lora") else "lora.paths", file)
    folder = locate_local(settings.model_location)
    if folder is not None:
        check_layout(folder, [name for name in components if name not in single])
    elif not is_hub_id(settings.model_location):
        raise CheckpointError(f"{_name_of(arguments, 'model_path')}: {settings.model_path} {UNKNOWN_MODEL}")


def _check_file(name: str, file: Path) -> None:
    if not file.is_file():
        raise CheckpointError(f"{name}: there is no file {file}")


def _name_of(arguments: argparse.Namespace, setting: str) -> str:
    """Return the flag that sets a setting if it was used, otherwise the setting."""
    return next((flag.names[0] for flag in ALL if setting in flag.settings and setting in vars(arguments)), setting)
