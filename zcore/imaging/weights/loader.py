"""Loading: from a checkpoint's folder to networks on their devices.

Takes a folder in the diffusers layout, and a network's placement; reads the files of that network only. Every weight
comes from the files: a tensor that is missing, unexpected, or of the wrong shape raises `CheckpointError`, and is never
replaced by random values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zcore.checkpoint.files import GGUF_SUFFIX, Component, check_layout, read_json, weight_files
from zcore.choices import Offload, Quantization
from zcore.errors import CheckpointError
from zcore.foreign_text import listed
from zcore.imaging.architecture.text_network import TextNetwork, TextNetworkConfig
from zcore.imaging.architecture.transformer_network import TransformerConfig, TransformerNetwork
from zcore.imaging.architecture.vae_network import VaeConfig, VaeNetwork
from zcore.imaging.weights.quantization import pack, packable, set_weight, unpacked_shape, with_leading_ones
from zcore.imaging.weights.single_file import read_single_file, read_weights

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a network computes, in which dtype, how its weights are quantized, and whether they are offloaded."""

    device: torch.device
    dtype: torch.dtype
    quantization: Quantization = "none"
    offload: Offload = "none"

    @property
    def storage_device(self) -> torch.device:
        """The device that holds the weights while they are not in use."""
        return self.device if self.offload == "none" else torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Networks:
    """The three networks of a checkpoint. Callers declare the interface that they use."""

    text_encoder: nn.Module
    transformer: nn.Module
    vae: nn.Module


def load_text_encoder(folder: Path, placement: Placement, file: Path | None = None) -> nn.Module:
    """Load the language model without its output head, which embeddings do not need. Raises `CheckpointError`.

    With a single `file`, this and the following functions read the weights from it and the configuration from the
    folder.
    """
    return _load("text_encoder", folder, placement, file)


def load_transformer(folder: Path, placement: Placement, file: Path | None = None) -> nn.Module:
    """Load the diffusion transformer. Raises `CheckpointError`."""
    return _load("transformer", folder, placement, file)


def load_vae(folder: Path, placement: Placement, file: Path | None = None) -> nn.Module:
    """Load the autoencoder between pixels and latents. Raises `CheckpointError`."""
    return _load("vae", folder, placement, file)


def build_meta(folder: Path) -> Networks:
    """Build all networks from their configurations on the meta device: names and shapes without weights."""
    return Networks(
        text_encoder=_without_weights(folder, "text_encoder"),
        transformer=_without_weights(folder, "transformer"),
        vae=_without_weights(folder, "vae"),
    )


def device_of(name: str) -> torch.device:
    """Return the device for `auto` (the best available), `cpu`, `mps`, `cuda`, or `cuda:N`.

    Raises `CheckpointError` for a device that is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CheckpointError(f"device: `{name}` is not a known device; use auto, cpu, mps, cuda, or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CheckpointError(f"device: {name} was requested, but torch {torch.__version__} finds no CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CheckpointError(f"device: {name} was requested; number of CUDA devices: {torch.cuda.device_count()}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise CheckpointError("device: mps was requested, but it is not available")
    if device.type not in ("cpu", "cuda", "mps"):
        raise CheckpointError(f"device: {name} is not supported; use auto, cpu, mps, cuda, or cuda:N")
    return device


def dtype_of(dtype: torch.dtype | str) -> torch.dtype:
    """Return a torch dtype, given itself or its name in the settings. Raises `CheckpointError` for any other."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise CheckpointError(f"torch_dtype: {dtype} is not supported; use one of {', '.join(DTYPES)}")
    return cast(torch.dtype, found)


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name as the settings write it."""
    return str(dtype).removeprefix("torch.")


def text_encoder_placement(
    device: torch.device, dtype: torch.dtype, quantization: Quantization = "none", offload: Offload = "none"
) -> Placement:
    """Return the text encoder's placement as requested, without offloading on a CPU."""
    return Placement(device, dtype, quantization, useful_offload(device, offload))


def transformer_placement(
    device: torch.device, dtype: torch.dtype, quantization: Quantization = "none", offload: Offload = "none"
) -> Placement:
    """Return the transformer's placement as requested, without offloading on a CPU.

    Raises `CheckpointError` for float16: the published weights overflow it and generate black images
    (Tongyi-MAI/Z-Image, issue 14).
    """
    if dtype == torch.float16:
        raise CheckpointError(
            "torch_dtype: float16 makes the transformer generate black images; use bfloat16 or float32"
        )
    return Placement(device, dtype, quantization, useful_offload(device, offload))


def useful_offload(device: torch.device, offload: Offload) -> Offload:
    """Return `none` for a CPU: weights are already in its memory, and copies would only double it."""
    return "none" if device.type == "cpu" else offload


def vae_placement(folder: Path, device: torch.device, dtype: torch.dtype) -> Placement:
    """Return the VAE's placement: float32 on a CPU or if the checkpoint has `force_upcast`, as the published one does.

    Otherwise the dtype is the requested one.
    """
    upcast = bool(read_json(folder / "vae" / "config.json").get("force_upcast", True))
    return Placement(device, torch.float32 if upcast or device.type == "cpu" else dtype)


class _NoInitialization(TorchFunctionMode):
    """Skip the random initial values of layers, which on the meta device would import torch's compiler."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if getattr(func, "__module__", None) == "torch.nn.init":
            return named.get("tensor", *args[:1])
        return func(*args, **named)


@dataclass(frozen=True, slots=True)
class _Architecture:
    """How to build a network: the type of its configuration, and the network of such a configuration."""

    config: type[msgspec.Struct]
    build: Callable[[Any], nn.Module]


_ARCHITECTURES: dict[Component, _Architecture] = {
    "text_encoder": _Architecture(TextNetworkConfig, TextNetwork),
    "transformer": _Architecture(TransformerConfig, TransformerNetwork),
    "vae": _Architecture(VaeConfig, VaeNetwork),
}


def _load(component: Component, folder: Path, placement: Placement, file: Path | None) -> nn.Module:
    """Load a network completely. Raises `CheckpointError` naming what its files lack."""
    check_layout(folder, [] if file else [component])
    if file and file.suffix == GGUF_SUFFIX and placement.quantization != "none":
        raise CheckpointError(f"{file} holds quantized weights; set quantization to none to use it")
    network = _without_weights(folder, component)
    if file:
        content = read_single_file(file, component, read_json(folder / component / "config.json"), placement.dtype)
    else:
        content = read_weights(weight_files(folder, component), component)
    wanted = dict(network.named_parameters())
    content = {
        name: with_leading_ones(tensor, wanted[name].shape) if name in wanted else tensor
        for name, tensor in content.items()
        if not name.startswith("lm_head.")  # the head of a language model is not needed
    }
    _check_names(wanted, content, file or folder / component)
    for name in wanted:
        set_weight(network, name, content.pop(name), placement.dtype)
    return _placed(network, placement)


def _without_weights(folder: Path, component: Component) -> nn.Module:
    """Build a network from its configuration on the meta device. Raises `CheckpointError` for one unsupported."""
    architecture, path = _ARCHITECTURES[component], folder / component / "config.json"
    try:
        config = msgspec.convert(read_json(path), architecture.config)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: {error}") from error
    with torch.device("meta"), _NoInitialization():
        return architecture.build(config)


def _check_names(wanted: Mapping[str, Tensor], content: Mapping[str, Tensor], source: Path) -> None:
    """Raise `CheckpointError` unless the source has exactly the wanted tensors, in their shapes."""
    faults = {
        "missing": wanted.keys() - content.keys(),
        "unexpected": content.keys() - wanted.keys(),
        "mismatched": {
            name for name in wanted.keys() & content.keys() if wanted[name].shape != unpacked_shape(content[name])
        },
    }
    for fault, names in faults.items():
        if names:
            raise CheckpointError(f"{source}: {fault} keys: {listed(sorted(names), 3)} ({len(names)} in total)")


def _placed(network: nn.Module, placement: Placement) -> nn.Module:
    """Quantize a network, and move it to the device that stores its weights."""
    network.eval().requires_grad_(False)
    for name in packable(network):
        pack(network, name, placement.quantization)
    return network.to(placement.storage_device)
