"""Command-line flags for settings, and `--set` for the settings without one.

`chosen_settings` combines the command line, the environment and the settings file into `Settings`. Precedence: flags,
`--set`, environment, profile. Independent of requests.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from zcore.errors import ConfigurationError
from zcore.settings import (
    Settings,
    load_settings,
    overrides_from_arguments,
    setting_names,
    setting_origins,
    setting_value,
)


@dataclass(frozen=True, slots=True)
class SettingFlag:
    """A flag for one or more settings. `needs` is the setting that must be on for the flag to have an effect."""

    names: tuple[str, ...]
    settings: tuple[str, ...]
    help: str
    needs: str | None = None


CHECKPOINT = (
    SettingFlag(
        ("--model-path",),
        ("model_path",),
        "Checkpoint: a folder in the diffusers layout, or a Hugging Face model name.",
    ),
)
TEMPLATES = (SettingFlag(("--templates-dir",), ("templates_dir",), "Folder with prompt templates."),)
ENCODER = (
    SettingFlag(
        ("--encoder-device",), ("encoder.device",), "Device of the text encoder: auto, cpu, mps, cuda or cuda:N."
    ),
    SettingFlag(
        ("--dtype",),
        ("pipeline.torch_dtype", "encoder.torch_dtype"),
        "Number format in which the text encoder and the transformer compute.",
    ),
    SettingFlag(
        ("--quantization",), ("encoder.quantization",), "Store the text encoder's weights in this smaller format."
    ),
    SettingFlag(
        ("--encoder-weights",),
        ("encoder.weights_file",),
        "Single file with the weights of the text encoder: safetensors or GGUF.",
    ),
)
TRANSFORMER_AND_VAE = (
    SettingFlag(
        ("--dit-device", "--device"),
        ("pipeline.device",),
        "Device of the transformer, and of the VAE unless --vae-device is given.",
    ),
    SettingFlag(("--vae-device",), ("pipeline.vae_device",), "Device of the VAE."),
    SettingFlag(
        ("--dit-quantization",), ("pipeline.quantization",), "Store the transformer's weights in this smaller format."
    ),
    SettingFlag(
        ("--dit-weights",),
        ("pipeline.weights_file",),
        "Single file with the weights of the transformer: safetensors or GGUF.",
    ),
    SettingFlag(("--vae-weights",), ("pipeline.vae_weights_file",), "Single file with the weights of the VAE."),
    SettingFlag(
        ("--cpu-offload",),
        ("pytorch.cpu_offload",),
        "Store the weights in CPU memory and copy them to the GPU when they are needed.",
    ),
    SettingFlag(
        ("--attention-backend",),
        ("pytorch.attention_backend",),
        "Attention kernel; auto selects FlashAttention if it is usable, else sdpa.",
    ),
    SettingFlag(
        ("--compile",),
        ("pytorch.compile",),
        "Compile the transformer: the first image is slow, later ones are about a tenth faster.",
    ),
    SettingFlag(("--tiled-vae",), ("pytorch.tiled_vae",), "Run the VAE in tiles even if memory suffices without them."),
    SettingFlag(("--tile-size",), ("pytorch.tile_size",), "Side of a tile in pixels."),
    SettingFlag(("--tile-overlap",), ("pytorch.tile_overlap",), "Overlap of neighboring tiles in pixels."),
    SettingFlag(("--dype",), ("dype.enabled",), "Dynamic position extrapolation, for images of 2K to 4K."),
    SettingFlag(("--dype-method",), ("dype.method",), "Method of extrapolating positions.", "dype.enabled"),
    SettingFlag(("--dype-scale",), ("dype.dype_scale",), "Strength of the extrapolation.", "dype.enabled"),
    SettingFlag(
        ("--dype-exponent",),
        ("dype.dype_exponent",),
        "How early the extrapolation fades over the steps.",
        "dype.enabled",
    ),
    SettingFlag(("--slg",), ("slg.enabled",), "Skip layer guidance, for better anatomy."),
    SettingFlag(("--slg-scale",), ("slg.scale",), "Strength of skip layer guidance.", "slg.enabled"),
    SettingFlag(("--slg-layers",), ("slg.layers",), "Layers to skip, such as 7,8,9.", "slg.enabled"),
    SettingFlag(
        ("--slg-start",), ("slg.start",), "Fraction of the steps at which the guidance starts, 0 to 1.", "slg.enabled"
    ),
    SettingFlag(
        ("--slg-stop",), ("slg.stop",), "Fraction of the steps at which the guidance stops, 0 to 1.", "slg.enabled"
    ),
)
ALL = (*CHECKPOINT, *TEMPLATES, *ENCODER, *TRANSFORMER_AND_VAE)
PATHS = ("model_path", "templates_dir", "encoder.weights_file", "pipeline.weights_file", "pipeline.vae_weights_file")
"""Settings whose flags take a path relative to the working folder."""


@dataclass(frozen=True, slots=True)
class ChosenSettings:
    """The settings in effect, and the source of each by its dotted name."""

    settings: Settings
    origins: dict[str, str]


def add_setting_flags(parser: argparse.ArgumentParser, flags: Sequence[SettingFlag]) -> None:
    """Add these flags, and `--config`, `--profile` and `--set`."""
    group = parser.add_argument_group(
        "settings", "Use --set, the environment or config.toml for settings that have no flag; see docs/settings.md."
    )
    group.add_argument(
        "--config", metavar="FILE", type=Path, help="Settings file to use instead of config/config.toml."
    )
    group.add_argument("--profile", metavar="NAME", help="Table of the settings file, such as demo or rtx4090.")
    group.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="Set any setting, such as pytorch.compile=true. Repeatable.",
    )
    _add(group, flags)
    if TRANSFORMER_AND_VAE[0] in flags:
        group.add_argument(
            "--lora",
            metavar="FILE:SCALE",
            action="append",
            default=[],
            help="LoRA file and its strength, such as style.safetensors:0.8. Repeatable.",
        )


def chosen_settings(arguments: argparse.Namespace) -> ChosenSettings:
    """Return the settings in effect for these arguments. Raises `ConfigurationError` if one is invalid."""
    given = vars(arguments)
    by_flag: dict[str, Any] = {}
    for flag in ALL:
        if flag.settings[0] in given:
            by_flag |= dict.fromkeys(flag.settings, given[flag.settings[0]])
    if given.get("lora"):
        by_flag |= _loras(arguments.lora)
    profile = {"profile": arguments.profile} if arguments.profile else {}
    overrides = {**overrides_from_arguments(arguments.set), **by_flag, **profile}
    settings = load_settings(os.environ, overrides, arguments.config)
    for flag in ALL:
        if flag.needs and flag.settings[0] in given and not value_of(settings, flag.needs):
            raise ConfigurationError(f"{flag.names[0]}: has no effect without {_flag_of(flag.needs)}")
    return ChosenSettings(settings, setting_origins(os.environ, overrides, arguments.config))


def value_of(settings: Settings, name: str) -> Any:
    """Return the value of a setting by its dotted name."""
    section, _, key = name.rpartition(".")
    return getattr(getattr(settings, section) if section else settings, key)


def _add(group: Any, flags: Sequence[SettingFlag]) -> None:
    for flag in flags:
        options = _value_options(flag)
        group.add_argument(*flag.names, dest=flag.settings[0], help=flag.help, default=argparse.SUPPRESS, **options)


def _value_options(flag: SettingFlag) -> dict[str, Any]:
    """Return the argparse options that parse the flag's value."""
    name = flag.settings[0]
    kind = setting_names()[name]
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    metavar = (
        "PATH" if name in PATHS else "DEVICE" if name.endswith("device") else "N,N" if name == "slg.layers" else "X"
    )
    return {"metavar": metavar, "type": _reader(flag)}


def _reader(flag: SettingFlag) -> Callable[[str], Any]:
    name = flag.settings[0]

    def read(text: str) -> Any:
        if name in PATHS:
            return _absolute(text)
        kind = setting_names()[name]
        kind = kind.__origin__ if get_origin(kind) is Annotated else kind
        written = f"[{text}]" if get_origin(kind) is tuple else text
        return setting_value(name, written, flag.names[0])

    return read


def _loras(arguments: Sequence[str]) -> dict[str, Any]:
    """Parse arguments such as `style.safetensors:0.8` into settings; the scale is 1 if omitted."""
    paths: list[str] = []
    scales: list[float] = []
    for argument in arguments:
        path, separator, scale = argument.rpartition(":")
        try:
            scales.append(float(scale) if separator else 1.0)
        except ValueError:
            raise ConfigurationError(
                f"--lora: must be FILE:SCALE such as style.safetensors:0.8, not `{argument}`"
            ) from None
        paths.append(_absolute(path or argument))
    return {"lora.paths": paths, "lora.scales": scales}


def _absolute(path: str) -> str:
    """Make an existing path absolute. Other values stay as they are, since they may be Hugging Face names."""
    return str(Path(path).absolute()) if Path(path).exists() else path


def _flag_of(setting: str) -> str:
    return next(flag.names[0] for flag in ALL if flag.settings[0] == setting)
