"""The settings that have a flag of their own, and `--set` for all others.

Takes a parser to add them to; gives the `Settings` that a command line, the environment and the file make together:
flag before `--set` before environment before profile. Does not know requests.
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
    """A flag that says one setting, or several at once. `needs` is the switch without which it does nothing."""

    names: tuple[str, ...]
    settings: tuple[str, ...]
    help: str
    needs: str | None = None


CHECKPOINT = (
    SettingFlag(
        ("--model-path",), ("model_path",), "The checkpoint: a folder in the diffusers layout, or a Hugging Face name."
    ),
)
TEMPLATES = (SettingFlag(("--templates-dir",), ("templates_dir",), "Folder of prompt templates."),)
ENCODER = (
    SettingFlag(
        ("--encoder-device",), ("encoder.device",), "Where the text encoder runs: auto, cpu, mps, cuda or cuda:N."
    ),
    SettingFlag(
        ("--dtype",),
        ("pipeline.torch_dtype", "encoder.torch_dtype"),
        "Arithmetic of the text encoder and the transformer.",
    ),
    SettingFlag(("--quantization",), ("encoder.quantization",), "The text encoder's weights in fewer bits."),
    SettingFlag(("--encoder-weights",), ("encoder.weights_file",), "A single file with the text encoder's weights."),
)
PAINTER = (
    SettingFlag(
        ("--dit-device", "--device"),
        ("pipeline.device",),
        "Where the transformer runs, and the VAE unless --vae-device says otherwise.",
    ),
    SettingFlag(("--vae-device",), ("pipeline.vae_device",), "Where the VAE runs."),
    SettingFlag(("--dit-quantization",), ("pipeline.quantization",), "The transformer's weights in fewer bits."),
    SettingFlag(
        ("--dit-weights",),
        ("pipeline.weights_file",),
        "A single file with the transformer's weights, safetensors or GGUF.",
    ),
    SettingFlag(("--vae-weights",), ("pipeline.vae_weights_file",), "A single file with the VAE's weights."),
    SettingFlag(
        ("--cpu-offload",), ("pytorch.cpu_offload",), "Weights rest in the CPU's memory and come to the GPU to compute."
    ),
    SettingFlag(("--attention-backend",), ("pytorch.attention_backend",), "Attention kernel; auto takes the fastest."),
    SettingFlag(
        ("--compile",),
        ("pytorch.compile",),
        "Compile the transformer: a slow first picture, then about a tenth faster.",
    ),
    SettingFlag(("--tiled-vae",), ("pytorch.tiled_vae",), "The VAE works in tiles even where memory would do."),
    SettingFlag(("--tile-size",), ("pytorch.tile_size",), "Side of a tile in pixels."),
    SettingFlag(("--tile-overlap",), ("pytorch.tile_overlap",), "Overlap of tiles in pixels."),
    SettingFlag(("--dype",), ("dype.enabled",), "Dynamic position extrapolation, for pictures of 2K to 4K."),
    SettingFlag(("--dype-method",), ("dype.method",), "How positions are extrapolated.", "dype.enabled"),
    SettingFlag(("--dype-scale",), ("dype.dype_scale",), "How strongly.", "dype.enabled"),
    SettingFlag(("--dype-exponent",), ("dype.dype_exponent",), "How fast that fades along the steps.", "dype.enabled"),
    SettingFlag(("--slg",), ("slg.enabled",), "Skip layer guidance, for better anatomy."),
    SettingFlag(("--slg-scale",), ("slg.scale",), "How strongly it guides.", "slg.enabled"),
    SettingFlag(("--slg-layers",), ("slg.layers",), "Which layers are skipped, as 7,8,9.", "slg.enabled"),
    SettingFlag(("--slg-start",), ("slg.start",), "Part of the steps at which it begins, 0 to 1.", "slg.enabled"),
    SettingFlag(("--slg-stop",), ("slg.stop",), "Part of the steps at which it ends, 0 to 1.", "slg.enabled"),
)
ALL = (*CHECKPOINT, *TEMPLATES, *ENCODER, *PAINTER)
PATHS = ("model_path", "templates_dir", "encoder.weights_file", "pipeline.weights_file", "pipeline.vae_weights_file")
"""Settings whose value is looked up from the working folder when a flag says it."""


@dataclass(frozen=True, slots=True)
class ChosenSettings:
    """The settings in force, where each comes from, and what the command line calls those that it said by a flag."""

    settings: Settings
    origins: dict[str, str]
    spelled: dict[str, str]


def add_setting_flags(parser: argparse.ArgumentParser, flags: Sequence[SettingFlag]) -> None:
    """`--config`, `--profile` and `--set`, and these."""
    group = parser.add_argument_group(
        "settings", "All others stand in the environment and in config.toml; see docs/settings.md."
    )
    group.add_argument("--config", metavar="FILE", type=Path, help="Settings file, in place of config/config.toml.")
    group.add_argument("--profile", metavar="NAME", help="Table of the settings file, as demo or rtx4090.")
    group.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="Any setting, as pytorch.compile=true. Repeatable.",
    )
    _add(group, flags)
    if PAINTER[0] in flags:
        group.add_argument(
            "--lora",
            metavar="FILE:SCALE",
            action="append",
            default=[],
            help="LoRA file with its strength, as style.safetensors:0.8. Repeatable.",
        )


def chosen_settings(said: argparse.Namespace) -> ChosenSettings:
    """What is in force. Raises `ConfigurationError`."""
    by_flag: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for flag in ALL:
        if flag.settings[0] in vars(said):
            by_flag |= dict.fromkeys(flag.settings, vars(said)[flag.settings[0]])
            spelled |= dict.fromkeys(flag.settings, flag.names[0])
    if getattr(said, "lora", []):
        by_flag |= _loras(said.lora)
        spelled["lora.paths"] = "--lora"
    profile = {"profile": said.profile} if said.profile else {}
    overrides = {**overrides_from_arguments(said.set), **by_flag, **profile}
    settings = load_settings(os.environ, overrides, said.config)
    for flag in ALL:
        if flag.needs and flag.settings[0] in vars(said) and not value_of(settings, flag.needs):
            raise ConfigurationError(f"{flag.names[0]}: does nothing without {_switch(flag.needs)}")
    return ChosenSettings(settings, setting_origins(os.environ, overrides, said.config), spelled)


def value_of(settings: Settings, name: str) -> Any:
    """A setting by its dotted name."""
    section, _, key = name.rpartition(".")
    return getattr(getattr(settings, section) if section else settings, key)


def _add(group: Any, flags: Sequence[SettingFlag]) -> None:
    for flag in flags:
        reading = _reading(flag)
        group.add_argument(*flag.names, dest=flag.settings[0], help=flag.help, default=argparse.SUPPRESS, **reading)


def _reading(flag: SettingFlag) -> dict[str, Any]:
    """What argparse does with the flag's value."""
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
            return _from_here(text)
        kind = setting_names()[name]
        kind = kind.__origin__ if get_origin(kind) is Annotated else kind
        written = f"[{text}]" if get_origin(kind) is tuple else text
        return setting_value(name, written, flag.names[0])

    return read


def _loras(said: Sequence[str]) -> dict[str, Any]:
    """`style.safetensors:0.8` as the settings have it; without a scale, 1."""
    paths: list[str] = []
    scales: list[float] = []
    for one in said:
        path, separator, scale = one.rpartition(":")
        try:
            scales.append(float(scale) if separator else 1.0)
        except ValueError:
            raise ConfigurationError(f"--lora: `{one}` has to be FILE:SCALE, as style.safetensors:0.8") from None
        paths.append(_from_here(path or one))
    return {"lora.paths": paths, "lora.scales": scales}


def _from_here(path: str) -> str:
    """A path as typed begins at the working folder; one that is not there may be a name of the hub's."""
    return str(Path(path).absolute()) if Path(path).exists() else path


def _switch(setting: str) -> str:
    return next(flag.names[0] for flag in ALL if flag.settings[0] == setting)
