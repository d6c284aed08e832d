"""What a picture takes of each device's memory, before a weight is read.

Takes the networks' shapes, where and how each is to be loaded, and what is to be painted; gives bytes by device and by
phase, and where the most is needed. Plain arithmetic: no device is asked and nothing is allocated. Does not know
settings and command lines.

A phase takes the weights that are on the device meanwhile and the working memory of whatever computes. The formulas
count tensors of the widest moment of a phase; tests follow the real networks' storages and hold the formulas to them.
Attention is counted as fused kernels have it, without a matrix of every token by every token. Not counted: LoRAs, the
cache of LoRAs, what skip layer guidance keeps (one hidden state), and the moments of loading.

B is the batch, N a picture's padded tokens, P the caption's, S = N + P, D the width, F that of the feed forward.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from zcore.imaging.geometry import PATCH_LATENTS, image_tokens, padded
from zcore.imaging.model.checkpoint import Component
from zcore.imaging.model.loader import Networks, Placement, spelled
from zcore.imaging.model.quantization import NF4_GROUP, Quantization, packable
from zcore.imaging.model.tiling import Tiling
from zcore.imaging.model.vae import UNTOLD_MEMORY_BYTES, WIDEST_TENSORS
from zcore.sizes import SIDE_MULTIPLE_PX, SMALLEST_SIDE_PX

Phase = Literal["encode", "denoise", "decode"]

COMPONENTS: tuple[Component, ...] = ("text_encoder", "transformer", "vae")

WORKER: Mapping[Phase, Component] = {"encode": "text_encoder", "denoise": "transformer", "decode": "vae"}
"""Who computes in a phase."""

COMES_FOR: Mapping[Component, tuple[Phase, ...]] = {
    "text_encoder": ("encode",),
    "transformer": ("denoise", "decode"),
    "vae": ("decode",),
}
"""When a network is on its device that rests elsewhere. The transformer is counted for the decoding too: it stays for
the request's next picture.
"""

FLOAT32 = torch.float32.itemsize

ROW_BYTES: Mapping[Quantization, int] = {"8bit": FLOAT32 + 1, "fp8": FLOAT32}
"""What torchao keeps for each row beside the weights: a scale, and in 8 bits a zero point."""

RUNTIME_BYTES = 768 * 1024**2
"""What a device loses beside tensors: to a CUDA context with torch's kernels about half a GB, the rest to workspaces of
cuBLAS and cuDNN and to fragments between the allocator's blocks. An allowance, not measured here. The same is taken
for Python with its libraries on a CPU.
"""

_BLOCK = re.compile(r"layers\.(\d+)\.(?!adaLN_modulation)")
"""Under this name both the transformer and the text encoder have their main blocks. What modulates stays."""

BLOCKS_AT_ONCE = 2
"""With the unit `block`: the block that computes, and the one on its way."""

DECODING_TENSORS, ENCODING_TENSORS = 3.0, 2.5
"""Tensors of full size and `block_out_channels[1]` channels at once: a decoder's last residual block holds its input,
the normed and the activated. An encoder's first one has five of half the channels.
"""


@dataclass(frozen=True, slots=True)
class Part:
    """How one network is to be loaded. Of a packed single file, as GGUF is, the weights are as large as the file."""

    placement: Placement
    packed_file_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Painting:
    """What is to be painted: `batch_size` pictures at once. `tiled` asks the VAE for tiles where none are needed."""

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
    """One network's weights: how many bytes they are, where they compute, and where they rest."""

    component: Component
    kind: str
    device: str
    rests_on: str
    size_bytes: int
    present_bytes: int
    """How many of them are on the device at once while it computes."""
    unpacked_bytes: int
    """The widest packed layer as it computes; 0 where none is packed."""


@dataclass(frozen=True, slots=True)
class PhaseMemory:
    """A phase on one device: weights that are there, and what the computation holds beside them."""

    phase: Phase
    weights_bytes: int
    working_bytes: int

    @property
    def total_bytes(self) -> int:
        """Without `RUNTIME_BYTES`."""
        return self.weights_bytes + self.working_bytes


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """All phases on one device, and the memory that it has, where that was said."""

    device: str
    phases: tuple[PhaseMemory, ...]
    memory_bytes: int | None

    @property
    def widest(self) -> PhaseMemory:
        """The phase that needs the most."""
        return max(self.phases, key=lambda phase: phase.total_bytes)

    @property
    def peak_bytes(self) -> int:
        """What the device has to have."""
        return self.widest.total_bytes + RUNTIME_BYTES

    @property
    def missing_bytes(self) -> int:
        """How much more than it has; 0 where it fits or nobody knows."""
        return 0 if self.memory_bytes is None else max(0, self.peak_bytes - self.memory_bytes)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What `estimate` found. `in_tiles` is whether the VAE decodes in tiles, asked for or because it has to."""

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
    painting: Painting,
    memory_bytes: Mapping[str, int] | None = None,
) -> Estimate:
    """What a picture takes of each device's memory.

    `networks` are those of `loader.build_meta`; without a part for the text encoder prompts come encoded.
    `memory_bytes` is what devices have, by `device_name`. On a CUDA device it decides, as the VAE does when it paints,
    whether one piece fits. Bytes of weights are exact, but those of single files. Working memory is within a tenth of
    what the real networks hold in torch's own operators.
    """
    weights = [_weights(name, getattr(networks, name), parts[name]) for name in COMPONENTS if name in parts]
    return _painted(networks, parts, weights, painting, memory_bytes or {})


def largest_square(
    networks: Networks, parts: Mapping[Component, Part], painting: Painting, memory_bytes: Mapping[str, int]
) -> int | None:
    """Side in pixels of the largest square picture that fits these devices, all else as in `painting`; None for none.

    Searched from the largest that the transformer can place downwards: where tiles begin, a larger picture may take
    less.
    """
    weights = [_weights(name, getattr(networks, name), parts[name]) for name in COMPONENTS if name in parts]
    _frames, *places = cast(Any, networks.transformer).config.axes_lens
    for side in range(min(*places) * SIDE_MULTIPLE_PX, SMALLEST_SIDE_PX - 1, -SIDE_MULTIPLE_PX):
        square = replace(painting, width_px=side, height_px=side)
        if _painted(networks, parts, weights, square, memory_bytes).fits:
            return side
    return None


def device_name(device: torch.device) -> str:
    """One name for a device: `cuda` and `cuda:0` are the same."""
    return str(device) if device.index else device.type


def weights_bytes(network: nn.Module, dtype: torch.dtype, quantization: Quantization = "none") -> int:
    """The bytes of a network's weights, packed as `quantization.pack` packs them; what is not packed is of `dtype`."""
    return sum(_sizes(network, dtype, quantization).values())


def denoising_tensors_bytes(transformer: nn.Module, painting: Painting, itemsize: int, unpacked_bytes: int = 0) -> int:
    """What a step holds at its widest moment: a block's feed forward, and the plans of the pictures.

    Of a block four tensors (B, S, F): both projections, the activated one, their product. Or two and an unpacked layer,
    where that is more. And five (B, S, D): what entered the first block and this one, the state after attention, what
    attention gave, what the feed forward was given. Then the picture's tokens, its latents and velocities.

    A plan has the caption, rotary tables in float32 and the factors of every block at every step; a batch has those of
    one step once more, joined. Guidance has a second plan and the velocity of the first.
    """
    model = cast(Any, transformer)
    width, hidden = int(model.config.dim), int(model.layers[0].feed_forward.w1.out_features)
    batch, guided = painting.batch_size, painting.guided
    picture, caption = padded(image_tokens(painting.width_px, painting.height_px)), padded(painting.prompt_tokens)
    tokens = batch * (picture + caption)
    one_of_f, one_of_d = tokens * hidden * itemsize, tokens * width * itemsize
    rotary = tokens * sum(model.config.axes_dims) * 2 * FLOAT32
    captions = batch * caption * width * itemsize
    factors = batch * (len(model.noise_refiner) + len(model.layers)) * 4 * width * itemsize
    plans = (rotary + captions + painting.steps * factors) * (2 if guided else 1)
    joined = rotary + captions + factors if batch > 1 else 0
    channels = int(model.config.in_channels) * PATCH_LATENTS**2
    seen = batch * picture * channels * (itemsize + FLOAT32 * (2 if guided else 1))
    return max(4 * one_of_f, 2 * one_of_f + unpacked_bytes) + 5 * one_of_d + plans + joined + seen


def encoding_tensors_bytes(text_encoder: nn.Module, tokens: int, itemsize: int, unpacked_bytes: int = 0) -> int:
    """What the text encoder holds at its widest moment, of one prompt.

    Three tensors of the feed forward's width, or two and an unpacked layer, three of its own width, the rotary tables.
    """
    config = cast(Any, text_encoder).config
    one_of_f = tokens * config.intermediate_size * itemsize
    return (
        max(3 * one_of_f, 2 * one_of_f + unpacked_bytes)
        + tokens * (3 * config.hidden_size + 2 * config.head_dim) * itemsize
    )


def decoding_tensors_bytes(vae: nn.Module, width_px: int, height_px: int, itemsize: int) -> int:
    """What the VAE's decoder holds at its widest moment, without what a convolution takes inside itself."""
    return round(DECODING_TENSORS * _one_of_full_size(vae, width_px, height_px, itemsize))


def picture_encoding_tensors_bytes(vae: nn.Module, width_px: int, height_px: int, itemsize: int) -> int:
    """The same of the VAE's encoder: less than the decoder takes for the same picture, which therefore decides."""
    return round(ENCODING_TENSORS * _one_of_full_size(vae, width_px, height_px, itemsize))


def _painted(
    networks: Networks,
    parts: Mapping[Component, Part],
    weights: Sequence[Weights],
    painting: Painting,
    memory_bytes: Mapping[str, int],
) -> Estimate:
    by_name = {one.component: one for one in weights}
    vae = parts["vae"].placement
    beside = _present(weights, "decode", by_name["vae"].device)
    one_piece = WIDEST_TENSORS * _one_of_full_size(
        networks.vae, painting.width_px, painting.height_px, vae.dtype.itemsize
    )
    in_tiles = painting.tiled or one_piece > _free_for_decoding(by_name["vae"], beside, memory_bytes)
    working: dict[Phase, int] = {}
    if "text_encoder" in parts:
        working["encode"] = encoding_tensors_bytes(
            networks.text_encoder,
            painting.prompt_tokens,
            parts["text_encoder"].placement.dtype.itemsize,
            by_name["text_encoder"].unpacked_bytes,
        )
    working["denoise"] = denoising_tensors_bytes(
        networks.transformer,
        painting,
        parts["transformer"].placement.dtype.itemsize,
        by_name["transformer"].unpacked_bytes,
    )
    working["decode"] = _tile_bytes(networks.vae, painting, vae.dtype.itemsize) if in_tiles else one_piece
    devices = [
        DeviceMemory(
            name,
            tuple(
                PhaseMemory(phase, _present(weights, phase, name), size if by_name[WORKER[phase]].device == name else 0)
                for phase, size in working.items()
            ),
            memory_bytes.get(name),
        )
        for name in dict.fromkeys(name for one in weights for name in (one.device, one.rests_on))
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
        rests_on=device_name(placement.rests_on),
        size_bytes=size,
        present_bytes=min(size, present),
        unpacked_bytes=_widest_packed(network) * placement.dtype.itemsize if packs else 0,
    )


def _kind(part: Part) -> str:
    dtype = spelled(part.placement.dtype)
    if part.packed_file_bytes is not None:
        return f"packed file, {dtype}"
    return dtype if part.placement.quantization == "none" else f"{part.placement.quantization}, {dtype}"


def _sizes(network: nn.Module, dtype: torch.dtype, quantization: Quantization) -> dict[str, int]:
    """Bytes of each weight."""
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
    """What is present where main blocks come one at a time: all others, and the largest block twice."""
    blocks: dict[str, int] = {}
    for name, size in sizes.items():
        if found := _BLOCK.match(name):
            blocks[found[1]] = blocks.get(found[1], 0) + size
    return sum(sizes.values()) - sum(blocks.values()) + BLOCKS_AT_ONCE * max(blocks.values())


def _present(weights: Iterable[Weights], phase: Phase, device: str) -> int:
    """The weights on a device during a phase; what rests elsewhere comes for its phases."""
    here = 0
    for one in weights:
        if one.rests_on == device:
            here += one.size_bytes
        if one.device == device != one.rests_on and phase in COMES_FOR[one.component]:
            here += one.present_bytes
    return here


def _free_for_decoding(vae: Weights, beside_bytes: int, memory_bytes: Mapping[str, int]) -> float:
    """What `PictureCoder` will find free."""
    if not vae.device.startswith("cuda"):
        return UNTOLD_MEMORY_BYTES
    return memory_bytes[vae.device] - RUNTIME_BYTES - beside_bytes if vae.device in memory_bytes else float("inf")


def _tile_bytes(vae: nn.Module, painting: Painting, itemsize: int) -> int:
    side = painting.tiling.size_px
    width, height = min(painting.width_px, side), min(painting.height_px, side)
    return WIDEST_TENSORS * _one_of_full_size(vae, width, height, itemsize)


def _one_of_full_size(vae: nn.Module, width_px: int, height_px: int, itemsize: int) -> int:
    """A tensor of every pixel and `block_out_channels[1]` channels."""
    return width_px * height_px * int(cast(Any, vae).config.block_out_channels[1]) * itemsize
