"""Estimate of the memory that an image needs on each device, before any weight is read.

Takes the networks' shapes, where and how each is loaded, and the image to generate; returns bytes by device and phase.
Plain arithmetic: queries no device and allocates nothing.

A phase needs the weights that are on the device during it, and the working memory of its computation. The formulas
count the tensors at the peak of a phase; tests trace the real networks' storages and compare. Attention is counted as
in fused kernels, without a matrix of every token by every token. Not counted: LoRAs, the cache of LoRAs, the hidden
state that skip layer guidance retains, and peaks while loading.

B is the batch, N an image's padded tokens, P the caption's, S = N + P, D the width, F the width of the feed forward.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from zcore.checkpoint.files import Component
from zcore.checkpoint.geometry import PATCH_LATENTS, image_tokens, padded
from zcore.choices import Quantization
from zcore.imaging.network.forward import Transformer
from zcore.imaging.network.tiling import Tiling
from zcore.imaging.network.vae import UNKNOWN_MEMORY_BYTES, WIDEST_TENSORS
from zcore.imaging.weights.loader import Networks, Placement, dtype_name
from zcore.imaging.weights.quantization import NF4_GROUP, packable
from zcore.sizes import SIDE_MULTIPLE_PX, SMALLEST_SIDE_PX
from zcore.stages import Phase

COMPONENTS: tuple[Component, ...] = ("text_encoder", "transformer", "vae")

COMPUTES: Mapping[Phase, Component] = {"encode": "text_encoder", "denoise": "transformer", "decode": "vae"}
"""The network that computes in a phase."""

PRESENT_IN: Mapping[Component, tuple[Phase, ...]] = {
    "text_encoder": ("encode",),
    "transformer": ("denoise", "decode"),
    "vae": ("decode",),
}
"""The phases in which an offloaded network is on its device. The transformer is counted for decoding too, because it
stays for the request's next image.
"""

FLOAT32 = torch.float32.itemsize

ROW_BYTES: Mapping[Quantization, int] = {"8bit": FLOAT32 + 1, "fp8": FLOAT32}
"""What torchao stores per row besides the weights: a scale, and for 8 bits a zero point."""

RUNTIME_BYTES = 768 * 1024**2
"""What a device uses besides tensors: about half a GB for a CUDA context with torch's kernels, the rest for workspaces
of cuBLAS and cuDNN and for fragmentation. An allowance, not measured here. The same is assumed for Python with its
libraries on a CPU.
"""

_BLOCK = re.compile(r"layers\.(\d+)\.(?!adaLN_modulation)")
"""Weights of the main blocks, in both the transformer and the text encoder. Modulating layers are not streamed."""

BLOCKS_AT_ONCE = 2
"""Blocks on the device with the unit `block`: the one that computes, and the one being copied."""

DECODING_TENSORS, ENCODING_TENSORS = 3.0, 2.0
"""Full-size tensors with `block_out_channels[1]` channels at the peak: a decoder's last residual block holds its input,
the normalized input and the activated one. An encoder's first block holds four with half the channels.
"""


@dataclass(frozen=True, slots=True)
class Part:
    """How one network is loaded. From a quantized single file, such as GGUF, the weights are as large as the file."""

    placement: Placement
    packed_file_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class GenerationShape:
    """What to generate: `batch_size` images at once. `tiled` makes the VAE use tiles even if it fits in one piece."""

    width_px: int = 1024
    height_px: int = 1024
    prompt_tokens: int = 512
    steps: int = 8
    batch_size: int = 1
    guided: bool = False
    tiled: bool = False
    tiling: Tiling = field(default_factory=Tiling)


@dataclass(frozen=True, slots=True)
class Weights:
    """One network's weights: their size, the device they compute on, and the one that stores them."""

    component: Component
    kind: str
    device: str
    storage_device: str
    size_bytes: int
    present_bytes: int
    """The number of their bytes that are on the device at once while it computes."""
    unpacked_bytes: int
    """The size of the largest quantized layer when dequantized; 0 if none is quantized."""


@dataclass(frozen=True, slots=True)
class PhaseMemory:
    """A phase on one device: the weights that are there, and the working memory."""

    phase: Phase
    weights_bytes: int
    working_bytes: int

    @property
    def total_bytes(self) -> int:
        """Weights and working memory, without `RUNTIME_BYTES`."""
        return self.weights_bytes + self.working_bytes


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """All phases on one device, and its memory if that is known."""

    device: str
    phases: tuple[PhaseMemory, ...]
    memory_bytes: int | None

    @property
    def runtime_bytes(self) -> int:
        """Allowance for memory outside tensors."""
        return RUNTIME_BYTES

    @property
    def widest(self) -> PhaseMemory:
        """The phase that needs the most memory."""
        return max(self.phases, key=lambda phase: phase.total_bytes)

    @property
    def peak_bytes(self) -> int:
        """The memory that the device must have."""
        return self.widest.total_bytes + self.runtime_bytes

    @property
    def missing_bytes(self) -> int:
        """The memory that the device lacks; 0 if everything fits or the device's memory is unknown."""
        return 0 if self.memory_bytes is None else max(0, self.peak_bytes - self.memory_bytes)


@dataclass(frozen=True, slots=True)
class Estimate:
    """The result of `estimate`. `in_tiles` is whether the VAE decodes in tiles, by request or by necessity."""

    weights: tuple[Weights, ...]
    devices: tuple[DeviceMemory, ...]
    in_tiles: bool

    @property
    def fits(self) -> bool:
        """Whether every device whose memory is known has enough."""
        return not any(device.missing_bytes for device in self.devices)


def estimate(
    networks: Networks,
    parts: Mapping[Component, Part],
    shape: GenerationShape,
    memory_bytes: Mapping[str, int] | None = None,
) -> Estimate:
    """Estimate the memory that an image needs on each device.

    `networks` come from `loader.build_meta`. Without a part for the text encoder, prompts are assumed to be encoded
    elsewhere. `memory_bytes` is the memory of devices by `device_name`; on a CUDA device it determines, as in the VAE
    itself, whether decoding fits in one piece. Sizes of weights are exact, except those of single files. Working memory
    is within a tenth of that of the real networks in torch's own operators.
    """
    weights = [_weights(name, getattr(networks, name), parts[name]) for name in COMPONENTS if name in parts]
    return _estimated(networks, parts, weights, shape, memory_bytes or {})


def largest_square(
    networks: Networks,
    parts: Mapping[Component, Part],
    shape: GenerationShape,
    memory_bytes: Mapping[str, int],
    max_pixels: float = math.inf,
) -> int | None:
    """Return the side in pixels of the largest square image of at most `max_pixels` that fits, or None.

    `shape` gives all but the size.

    The search goes downwards from the largest size that the transformer supports, because an image large enough for
    tiles may need less memory than a smaller one.
    """
    weights = [_weights(name, getattr(networks, name), parts[name]) for name in COMPONENTS if name in parts]
    _frames, *rows_and_columns = _config(networks.transformer).axes_lens
    for side in range(min(*rows_and_columns) * SIDE_MULTIPLE_PX, SMALLEST_SIDE_PX - 1, -SIDE_MULTIPLE_PX):
        if side * side > max_pixels:
            continue
        square = replace(shape, width_px=side, height_px=side)
        if _estimated(networks, parts, weights, square, memory_bytes).fits:
            return side
    return None


def device_name(device: torch.device) -> str:
    """Return a unique name for a device: `cuda` and `cuda:0` are the same."""
    return str(device) if device.index else device.type


def weights_bytes(network: nn.Module, dtype: torch.dtype, quantization: Quantization = "none") -> int:
    """Return the bytes of a network's weights, quantized as by `quantization.pack`; the others have `dtype`."""
    return sum(_sizes(network, dtype, quantization).values())


def denoising_tensors_bytes(
    transformer: nn.Module, shape: GenerationShape, itemsize: int, unpacked_bytes: int = 0
) -> int:
    """Return the peak memory of a step, in a block's feed forward, and of the images' plans.

    A block holds four tensors (B, S, F): both projections, the activated one, and their product; or two and a
    dequantized layer, if that is more. It also holds five (B, S, D): the inputs of the first block and of this one, the
    state after attention, attention's output, and the feed forward's input. The image's tokens, latents, and velocities
    come on top.

    A plan has the caption, rotary tables in float32, and the factors of every block at every step; a batch has those of
    one step again, joined. Guidance needs a second plan and the velocity of the first.
    """
    model = cast(Transformer, transformer)
    width, hidden = int(model.config.dim), _feed_forward_width(transformer)
    batch, guided = shape.batch_size, shape.guided
    image, caption = padded(image_tokens(shape.width_px, shape.height_px)), padded(shape.prompt_tokens)
    tokens = batch * (image + caption)
    one_of_f, one_of_d = tokens * hidden * itemsize, tokens * width * itemsize
    rotary = tokens * sum(model.config.axes_dims) * 2 * FLOAT32
    captions = batch * caption * width * itemsize
    factors = batch * (len(model.noise_refiner) + len(model.layers)) * 4 * width * itemsize
    plans = (rotary + captions + shape.steps * factors) * (2 if guided else 1)
    joined = rotary + captions + factors if batch > 1 else 0
    channels = int(model.config.in_channels) * PATCH_LATENTS**2
    latents = batch * image * channels * (itemsize + FLOAT32 * (2 if guided else 1))
    return max(4 * one_of_f, 2 * one_of_f + unpacked_bytes) + 5 * one_of_d + plans + joined + latents


def encoding_tensors_bytes(text_encoder: nn.Module, tokens: int, itemsize: int, unpacked_bytes: int = 0) -> int:
    """Return the text encoder's peak memory for one prompt.

    It holds three tensors of the feed forward's width, or two and a dequantized layer, three of its own width, and the
    rotary tables.
    """
    config = _config(text_encoder)
    one_of_f = tokens * config.intermediate_size * itemsize
    return (
        max(3 * one_of_f, 2 * one_of_f + unpacked_bytes)
        + tokens * (3 * config.hidden_size + 2 * config.head_dim) * itemsize
    )


def decoding_tensors_bytes(vae: nn.Module, width_px: int, height_px: int, itemsize: int) -> int:
    """Return the peak memory of the VAE's decoder, without that inside a convolution."""
    return round(DECODING_TENSORS * _one_of_full_size(vae, width_px, height_px, itemsize))


def image_encoding_tensors_bytes(vae: nn.Module, width_px: int, height_px: int, itemsize: int) -> int:
    """Return the peak memory of the VAE's encoder: less than the decoder's for the same image."""
    return round(ENCODING_TENSORS * _one_of_full_size(vae, width_px, height_px, itemsize))


def _estimated(
    networks: Networks,
    parts: Mapping[Component, Part],
    weights: Sequence[Weights],
    shape: GenerationShape,
    memory_bytes: Mapping[str, int],
) -> Estimate:
    by_name = {one.component: one for one in weights}
    vae = parts["vae"].placement
    present_bytes = _present(weights, "decode", by_name["vae"].device)
    one_piece = WIDEST_TENSORS * _one_of_full_size(networks.vae, shape.width_px, shape.height_px, vae.dtype.itemsize)
    in_tiles = shape.tiled or one_piece > _free_for_decoding(by_name["vae"], present_bytes, memory_bytes)
    working: dict[Phase, int] = {}
    if "text_encoder" in parts:
        working["encode"] = encoding_tensors_bytes(
            networks.text_encoder,
            shape.prompt_tokens,
            parts["text_encoder"].placement.dtype.itemsize,
            by_name["text_encoder"].unpacked_bytes,
        )
    working["denoise"] = denoising_tensors_bytes(
        networks.transformer,
        shape,
        parts["transformer"].placement.dtype.itemsize,
        by_name["transformer"].unpacked_bytes,
    )
    working["decode"] = _tile_bytes(networks.vae, shape, vae.dtype.itemsize) if in_tiles else one_piece
    devices = [
        DeviceMemory(
            name,
            tuple(
                PhaseMemory(
                    phase, _present(weights, phase, name), size if by_name[COMPUTES[phase]].device == name else 0
                )
                for phase, size in working.items()
            ),
            memory_bytes.get(name),
        )
        for name in dict.fromkeys(name for one in weights for name in (one.device, one.storage_device))
    ]
    return Estimate(tuple(weights), tuple(devices), in_tiles)


def _weights(component: Component, network: nn.Module, part: Part) -> Weights:
    placement = part.placement
    sizes = _sizes(network, placement.dtype, placement.quantization)
    whole = sum(sizes.values())
    size = whole if part.packed_file_bytes is None else part.packed_file_bytes
    present = _streamed_bytes(sizes) * size // whole if placement.offload == "block" else size
    packs = part.packed_file_bytes is not None or placement.quantization != "none"
    return Weights(
        component=component,
        kind=_kind(part),
        device=device_name(placement.device),
        storage_device=device_name(placement.storage_device),
        size_bytes=size,
        present_bytes=min(size, present),
        unpacked_bytes=_widest_packed(network) * placement.dtype.itemsize if packs else 0,
    )


def _kind(part: Part) -> str:
    dtype = dtype_name(part.placement.dtype)
    if part.packed_file_bytes is not None:
        return f"packed file, {dtype}"
    return dtype if part.placement.quantization == "none" else f"{part.placement.quantization}, {dtype}"


def _sizes(network: nn.Module, dtype: torch.dtype, quantization: Quantization) -> dict[str, int]:
    """Return the bytes of each weight."""
    packed = set[str]() if quantization == "none" else {f"{name}.weight" for name in packable(network)}
    return {
        name: _packed_bytes(weight, quantization) if name in packed else weight.numel() * dtype.itemsize
        for name, weight in network.named_parameters()
    }


def _packed_bytes(weight: Tensor, quantization: Quantization) -> int:
    if quantization == "4bit":
        return weight.numel() // 2 + weight.numel() // NF4_GROUP * FLOAT32
    return weight.numel() + weight.shape[0] * ROW_BYTES[quantization]


def _widest_packed(network: nn.Module) -> int:
    return max(cast(nn.Linear, network.get_submodule(name)).weight.numel() for name in packable(network))


def _streamed_bytes(sizes: Mapping[str, int]) -> int:
    """Return what is on the device if blocks are streamed: all other weights, and the largest block twice."""
    blocks: dict[str, int] = {}
    for name, size in sizes.items():
        if found := _BLOCK.match(name):
            blocks[found[1]] = blocks.get(found[1], 0) + size
    return sum(sizes.values()) - sum(blocks.values()) + BLOCKS_AT_ONCE * max(blocks.values())


def _present(weights: Iterable[Weights], phase: Phase, device: str) -> int:
    """Return the weights on a device during a phase, including offloaded ones that are present in it."""
    here = 0
    for one in weights:
        if one.storage_device == device:
            here += one.size_bytes
        if one.device == device != one.storage_device and phase in PRESENT_IN[one.component]:
            here += one.present_bytes
    return here


def _free_for_decoding(vae: Weights, present_bytes: int, memory_bytes: Mapping[str, int]) -> float:
    """Return the memory that `VaeCodec` will find free."""
    if not vae.device.startswith("cuda"):
        return UNKNOWN_MEMORY_BYTES
    return memory_bytes[vae.device] - RUNTIME_BYTES - present_bytes if vae.device in memory_bytes else float("inf")


def _tile_bytes(vae: nn.Module, shape: GenerationShape, itemsize: int) -> int:
    side = shape.tiling.size_px
    width, height = min(shape.width_px, side), min(shape.height_px, side)
    return WIDEST_TENSORS * _one_of_full_size(vae, width, height, itemsize)


def _feed_forward_width(transformer: nn.Module) -> int:
    return cast(nn.Linear, transformer.get_submodule("layers.0.feed_forward.w1")).out_features


def _config(network: nn.Module) -> Any:
    return network.config


def _one_of_full_size(vae: nn.Module, width_px: int, height_px: int, itemsize: int) -> int:
    """Return the size of a tensor with every pixel and `block_out_channels[1]` channels."""
    return width_px * height_px * int(_config(vae).block_out_channels[1]) * itemsize
