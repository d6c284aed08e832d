"""How a checkpoint is loaded and run, as one frozen value.

`ZImagePipeline.from_pretrained(path, **options)` and the operator's settings (`from_settings`) both build a
`LoadOptions`; every default is defined here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import torch

from zcore.choices import (
    AttentionBackend,
    BatchSize,
    CacheBytes,
    CompileMode,
    Device,
    Offload,
    OffloadUnit,
    Quantization,
    TileOverlap,
    TileSize,
)
from zcore.errors import CheckpointError, did_you_mean
from zcore.imaging.network.tiling import Tiling
from zcore.imaging.option_checks import option_types, refuse_invalid
from zcore.imaging.weights import loader
from zcore.imaging.weights.loader import Placement
from zcore.request import GenerationDefaults, HiddenLayer, Shift

DeviceFinder = Callable[[str], torch.device]
"""Finds a device by its name; `loader.device_of` unless a caller simulates another machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderOptions:
    """Where and how the text encoder runs; `PromptEncoder.from_pretrained` takes these as keyword arguments.

    `device` is `auto`, `cpu`, `mps`, `cuda` or `cuda:N`. `quantization` stores the weights in fewer bits. With an
    `offload` the weights stay in the CPU's memory and are copied to the device to encode. `weights` is a single file to
    read instead of the checkpoint's. `hidden_layer` is the one that most requests read: loading a checkpoint without it
    fails. `templates_dir` is one or more folders of prompt templates; a template of a later folder replaces one of the
    same name. The least recently used embeddings beyond `embedding_cache_bytes` are dropped.
    """

    device: Device = "auto"
    torch_dtype: torch.dtype = torch.bfloat16
    quantization: Quantization = "none"
    offload: Offload = "none"
    weights: Path | None = None
    hidden_layer: HiddenLayer = GenerationDefaults().hidden_layer
    templates_dir: tuple[Path, ...] = ()
    embedding_cache_bytes: CacheBytes = 0

    def __post_init__(self) -> None:
        refuse_invalid({name: getattr(self, name) for name in _ENCODER_TYPES}, _ENCODER_TYPES)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "EncoderOptions":
        """Build the options from keyword arguments of any accepted type.

        Raises TypeError for an unknown name, naming the nearest one, and `ConfigurationError` for invalid values.
        """
        _refuse_unknown(options, ENCODER_OPTION_NAMES)
        return cls(**_converted(options))

    def placement(self, device_of: DeviceFinder | None = None) -> Placement:
        """Return where the text encoder computes. Raises `CheckpointError` for a device that is not available."""
        device = (device_of or loader.device_of)(self.device)
        return loader.text_encoder_placement(device, self.torch_dtype, self.quantization, self.offload)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """Where and how a checkpoint's networks run; `ZImagePipeline.from_pretrained` takes these as keyword arguments.

    `of` also accepts the public names for the transformer (`dit_device`, `dit_quantization`, `dit_weights`) and for
    tiles (`tile_size`, `tile_overlap`). `torch_dtype` is the transformer's, and the text encoder's unless
    `encoder_dtype` is given; the VAE computes in float32 if the checkpoint or a CPU requires it. `batch_size` images of
    a request are generated in one forward. `fused_loras` are LoRA files with scales that apply to every image.
    `defaults` are the values of fields that a call omits; if they are not given, those of the published model apply,
    with this `shift` or else the checkpoint's.
    """

    encoder: EncoderOptions = field(default_factory=EncoderOptions)
    transformer_device: Device = "auto"
    vae_device: Device = "auto"
    torch_dtype: torch.dtype = torch.bfloat16
    transformer_quantization: Quantization = "none"
    transformer_weights: Path | None = None
    vae_weights: Path | None = None
    offload: Offload = "none"
    batch_size: BatchSize = 1
    shift: Shift | None = None
    defaults: GenerationDefaults | None = None
    compile: bool = False
    compile_mode: CompileMode = "default"
    attention_backend: AttentionBackend = "auto"
    tiling: Tiling = field(default_factory=Tiling)
    fused_loras: tuple[tuple[Path, float], ...] = ()

    def __post_init__(self) -> None:
        refuse_invalid({name: getattr(self, name) for name in _TYPES}, _TYPES)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "LoadOptions":
        """Build the options from keyword arguments of any accepted type.

        Raises TypeError for an unknown name, naming the nearest one, and `ConfigurationError` listing every value that
        is out of bounds or of a wrong type.
        """
        _refuse_unknown(options, OPTION_NAMES)
        given = _converted(options)
        refuse_invalid(given, _PUBLIC_TYPES)
        offload = given.pop("cpu_offload_unit", _DEFAULT_OFFLOAD_UNIT) if given.pop("cpu_offload", False) else "none"
        given.pop("cpu_offload_unit", None)
        tiles = {_TILE_FIELDS[name]: given.pop(name) for name in _TILE_FIELDS if name in given}
        encoder = {_ENCODER_FIELDS[name]: given.pop(name) for name in _ENCODER_FIELDS if name in given}
        if "torch_dtype" in given:
            encoder.setdefault("torch_dtype", given["torch_dtype"])
        own = {_TRANSFORMER_FIELDS.get(name, name): value for name, value in given.items()}
        return cls(
            encoder=EncoderOptions.of({**encoder, "offload": offload}),
            tiling=Tiling(**tiles),
            offload=offload,
            **own,
        )

    def with_device(self, device: Any) -> "LoadOptions":
        """Return these options with all networks on one device. Raises `ConfigurationError` for an unknown one."""
        name = _as_device(device)
        refuse_invalid({"device": name}, _ENCODER_TYPES)
        encoder = replace(self.encoder, device=name)
        return replace(self, encoder=encoder, transformer_device=name, vae_device=name)

    def with_dtype(self, dtype: Any) -> "LoadOptions":
        """Return these options with transformer and text encoder in one dtype. Raises `ConfigurationError`."""
        return replace(self, encoder=replace(self.encoder, torch_dtype=_as_dtype(dtype)), torch_dtype=_as_dtype(dtype))

    @property
    def weight_files(self) -> dict[str, Path]:
        """The single files that replace a network's weights, by component."""
        files = {"transformer": self.transformer_weights, "vae": self.vae_weights}
        return {component: file for component, file in files.items() if file is not None}

    def transformer_placement(self, device_of: DeviceFinder | None = None) -> Placement:
        """Return where the transformer computes. Raises `CheckpointError` for a device that is not available."""
        device = (device_of or loader.device_of)(self.transformer_device)
        return loader.transformer_placement(device, self.torch_dtype, self.transformer_quantization, self.offload)

    def vae_placement(self, folder: Path, device_of: DeviceFinder | None = None) -> Placement:
        """Return where the VAE of the checkpoint in `folder` computes. Raises as `transformer_placement` does."""
        return loader.vae_placement(folder, (device_of or loader.device_of)(self.vae_device), self.torch_dtype)

    def compile_mode_for(self, placement: Placement) -> CompileMode | None:
        """Return the mode to compile the forward in; None to run it eagerly.

        Raises `CheckpointError` for a transformer that is offloaded by block.
        """
        if not self.compile:
            return None
        if placement.offload == "block":
            raise CheckpointError(
                "compile: a compiled forward is one graph, so blocks cannot be moved within it; set "
                "cpu_offload_unit to `network`, or switch compile off"
            )
        return self.compile_mode

    def generation_defaults(self, checkpoint_shift: float) -> GenerationDefaults:
        """Return the values of fields that a call omits.

        They are `defaults` if given, else the published values with `shift` or, without one, the checkpoint's shift.
        """
        if self.defaults is not None:
            return self.defaults
        shift = checkpoint_shift if self.shift is None else self.shift
        return GenerationDefaults(shift=shift, hidden_layer=self.encoder.hidden_layer)


_DEFAULT_OFFLOAD_UNIT: Offload = "block"
_ENCODER_FIELDS = {
    "encoder_device": "device",
    "encoder_dtype": "torch_dtype",
    "encoder_quantization": "quantization",
    "encoder_weights": "weights",
    "hidden_layer": "hidden_layer",
    "templates_dir": "templates_dir",
    "embedding_cache_bytes": "embedding_cache_bytes",
}
_TRANSFORMER_FIELDS = {
    "dit_device": "transformer_device",
    "dit_quantization": "transformer_quantization",
    "dit_weights": "transformer_weights",
}
_TILE_FIELDS = {"tile_size": "size_px", "tile_overlap": "overlap_px"}
_ENCODER_TYPES = option_types(EncoderOptions)
_TYPES = option_types(LoadOptions)
_PUBLIC_TYPES: dict[str, Any] = {
    **{public: _ENCODER_TYPES[name] for public, name in _ENCODER_FIELDS.items()},
    **{public: _TYPES[name] for public, name in _TRANSFORMER_FIELDS.items()},
    "tile_size": TileSize,
    "tile_overlap": TileOverlap,
    "cpu_offload": bool,
    "cpu_offload_unit": OffloadUnit,
    **{
        name: _TYPES[name]
        for name in (
            "vae_device",
            "torch_dtype",
            "vae_weights",
            "batch_size",
            "shift",
            "defaults",
            "compile",
            "compile_mode",
            "attention_backend",
            "fused_loras",
        )
    },
}
ENCODER_OPTION_NAMES = tuple(option.name for option in fields(EncoderOptions))
"""Keyword arguments of `PromptEncoder.from_pretrained`."""

OPTION_NAMES = tuple(_PUBLIC_TYPES)
"""Keyword arguments of `ZImagePipeline.from_pretrained`."""


def _refuse_unknown(options: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in options:
        if name not in known:
            raise TypeError(f"there is no option `{name}`{did_you_mean(name, known)}")


def _converted(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given options with paths and dtypes as the fields hold them; None counts as not given.

    A value of a wrong type is left as it is, for the check that follows to name.
    """
    return {name: _CONVERSIONS.get(name, _same)(value) for name, value in options.items() if value is not None}


def _same(value: Any) -> Any:
    return value


def _as_device(value: Any) -> Any:
    return str(value) if isinstance(value, torch.device) else value


def _as_dtype(value: Any) -> Any:
    return loader.DTYPES.get(value, value) if isinstance(value, str) else value


def _as_path(value: Any) -> Any:
    return Path(value) if isinstance(value, str) and value else value


def _as_folders(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_as_path(one) for one in cast(Sequence[Any], value))
    return (_as_path(value),) if isinstance(value, str | Path) else value


def _as_loras(value: Any) -> Any:
    return tuple(map(_as_scaled_file, cast(Sequence[Any], value))) if isinstance(value, list | tuple) else value


def _as_scaled_file(value: Any) -> Any:
    match value:
        case (file, scale):
            return (_as_path(file), scale)
        case _:
            return value


_CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("device", "encoder_device", "dit_device", "vae_device"), _as_device),
    **dict.fromkeys(("torch_dtype", "encoder_dtype"), _as_dtype),
    **dict.fromkeys(("weights", "encoder_weights", "dit_weights", "vae_weights"), _as_path),
    "templates_dir": _as_folders,
    "fused_loras": _as_loras,
}
