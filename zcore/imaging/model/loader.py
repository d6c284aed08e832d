"""From a checkpoint's folder to networks on their devices.

Takes a folder in the diffusers layout and where and how a network shall run; gives the network, and reads the files of
no other. Every weight comes from the folder: a tensor that is missing, left over or of another shape is a
`CheckpointError`, never a random value. Does not know prompts, requests or pictures.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import init_empty_weights
from torch import nn

from zcore.errors import CheckpointError
from zcore.imaging.model.checkpoint import GGUF_SUFFIX, Component, check_layout, read_json
from zcore.imaging.model.quantization import Quantization, pack, packable, put, quiet_imports, shape_of
from zcore.imaging.model.single_file import read_single_file

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


Offload = Literal["none", "network", "block"]
"""What of a network comes to its device at once to compute; with `none` all of it stays there."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a network computes and in which arithmetic, in how many bits its weights are, and where they rest."""

    device: torch.device
    dtype: torch.dtype
    quantization: Quantization = "none"
    offload: Offload = "none"

    @property
    def rests_on(self) -> torch.device:
        """Where weights are while they do not compute."""
        return self.device if self.offload == "none" else torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Networks:
    """The three networks of a checkpoint. What each takes is named by whoever calls it."""

    text_encoder: nn.Module
    transformer: nn.Module
    vae: nn.Module


def load_text_encoder(folder: Path, placement: Placement, file: Path | None = None) -> nn.Module:
    """The language model, without the head that no embedding needs. Raises `CheckpointError`.

    As all of these, out of a single `file` where there is one, with the folder's configuration.
    """
    if file:
        return _load_file(folder, "text_encoder", placement, file)
    with quiet_imports():
        from transformers import Qwen3Model

    # Mismatches are reported below; unasked, transformers would raise without naming one.
    return _load(Qwen3Model, folder, "text_encoder", placement, ignore_mismatched_sizes=True)


def load_transformer(folder: Path, placement: Placement, file: Path | None = None) -> nn.Module:
    """The diffusion transformer. Raises `CheckpointError`."""
    if file:
        return _load_file(folder, "transformer", placement, file)
    with quiet_imports():
        from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel

    return _load(ZImageTransformer2DModel, folder, "transformer", placement)


def load_vae(folder: Path, placement: Placement, file: Path | None = None) -> nn.Module:
    """The autoencoder between pixels and latents. Raises `CheckpointError`."""
    if file:
        return _load_file(folder, "vae", placement, file)
    with quiet_imports():
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return _load(AutoencoderKL, folder, "vae", placement)


def build_meta(folder: Path) -> Networks:
    """All networks by their configurations alone, on the meta device: names and shapes without weights."""
    return Networks(
        text_encoder=_without_weights(folder, "text_encoder"),
        transformer=_without_weights(folder, "transformer"),
        vae=_without_weights(folder, "vae"),
    )


def device_of(name: str) -> torch.device:
    """`auto` (the best there is), `cpu`, `mps`, `cuda` or `cuda:N`. Raises `CheckpointError` for one not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CheckpointError(f"device: there is no kind of device `{name}`") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CheckpointError(f"device: {name} was asked for, and torch {torch.__version__} sees no CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CheckpointError(f"device: {name} was asked for, and there are {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise CheckpointError("device: mps was asked for, and there is none")
    if device.type not in ("cpu", "cuda", "mps"):
        raise CheckpointError(f"device: {name} is not cpu, mps, cuda or cuda:N")
    return device


def dtype_of(dtype: torch.dtype | str) -> torch.dtype:
    """A torch type, or its name as settings spell it. Raises `CheckpointError` for any other."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise CheckpointError(f"torch_dtype: {dtype} is not one of {', '.join(DTYPES)}")
    return cast(torch.dtype, found)


def spelled(dtype: torch.dtype) -> str:
    """A type's name as settings spell it."""
    return str(dtype).removeprefix("torch.")


def text_encoder_placement(
    device: torch.device, dtype: torch.dtype, quantization: Quantization = "none", offload: Offload = "none"
) -> Placement:
    """As it is asked for, but that on a CPU nothing is offloaded."""
    return Placement(device, dtype, quantization, useful_offload(device, offload))


def transformer_placement(
    device: torch.device, dtype: torch.dtype, quantization: Quantization = "none", offload: Offload = "none"
) -> Placement:
    """Float16 is refused: the published weights overflow it and paint black (Tongyi-MAI/Z-Image, issue 14)."""
    if dtype == torch.float16:
        raise CheckpointError("torch_dtype: float16 makes the transformer paint black; use bfloat16 or float32")
    return Placement(device, dtype, quantization, useful_offload(device, offload))


def useful_offload(device: torch.device, offload: Offload) -> Offload:
    """On a CPU weights rest where they compute, and copying them would only take twice the memory."""
    return "none" if device.type == "cpu" else offload


def vae_placement(folder: Path, device: torch.device, dtype: torch.dtype) -> Placement:
    """Float32 where the checkpoint says so (`force_upcast`, as the published one does) and on a CPU, else as asked."""
    upcast = bool(read_json(folder / "vae" / "config.json").get("force_upcast", True))
    return Placement(device, torch.float32 if upcast or device.type == "cpu" else dtype)


def _load(network: Any, model: Path, component: str, placement: Placement, **options: bool) -> nn.Module:
    """One network, complete. Raises `CheckpointError` naming what its files lack."""
    check_layout(model, [component])
    folder = model / component
    with _no_progress_bars():
        try:
            loaded, report = network.from_pretrained(
                str(folder),
                dtype=placement.dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise CheckpointError(f"{folder} cannot be loaded: {error}") from error
    for fault in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        # The head of a language model is not needed.
        names = sorted(str(name) for name in report[fault] if not str(name).startswith("lm_head."))
        if names:
            raise CheckpointError(f"{folder}: {fault.replace('_', ' ')}: {', '.join(names[:3])} ({len(names)} in all)")
    return _placed(cast(nn.Module, loaded), placement)


def _without_weights(folder: Path, component: Component) -> nn.Module:
    with quiet_imports():
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
        from transformers import Qwen3Config, Qwen3Model
    config = read_json(folder / component / "config.json")
    # Buffers are no weights: they are computed here, and no file has them.
    with init_empty_weights(include_buffers=False):
        if component == "text_encoder":
            return Qwen3Model(Qwen3Config(**config))
        network: Any = ZImageTransformer2DModel if component == "transformer" else AutoencoderKL
        return cast(nn.Module, network.from_config(config))


def _load_file(model: Path, component: Component, placement: Placement, file: Path) -> nn.Module:
    """A network with the weights of a file, complete. Raises `CheckpointError` naming what it lacks."""
    check_layout(model, [])
    if file.suffix == GGUF_SUFFIX and placement.quantization != "none":
        raise CheckpointError(f"{file} holds packed weights; with it, quantization has to be none")
    network = _without_weights(model, component)
    content = read_single_file(file, component, read_json(model / component / "config.json"), placement.dtype)
    wanted = dict(network.named_parameters())
    content = {name: tensor for name, tensor in content.items() if not name.startswith("lm_head.")}
    faults = {
        "missing": wanted.keys() - content.keys(),
        "unexpected": content.keys() - wanted.keys(),
        "mismatched": {
            name for name in wanted.keys() & content.keys() if wanted[name].shape != shape_of(content[name])
        },
    }
    for fault, names in faults.items():
        if names:
            listed = ", ".join(sorted(names)[:3])
            raise CheckpointError(f"{file}: {fault} keys: {listed} ({len(names)} in all)")
    for name in wanted:
        put(network, name, content.pop(name), placement.dtype)
    return _placed(network, placement)


def _placed(network: nn.Module, placement: Placement) -> nn.Module:
    """Packed as it shall be, where it rests."""
    network.eval().requires_grad_(False)
    for name in packable(network):
        pack(network, name, placement.quantization)
    return network.to(placement.rests_on)


@contextmanager
def _no_progress_bars() -> Generator[None]:
    """Standard error belongs to the log while a checkpoint loads."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [library for library in (of_diffusers, of_transformers) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
