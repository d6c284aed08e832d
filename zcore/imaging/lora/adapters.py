"""Adapters: LoRAs applied to a network by wrapping its layers, without changing the network.

Takes a network, LoRAs from `lora_file`, and scales; returns another network that shares every weight with the first and
computes, for a layer W with the LoRAs i,

    y = W x + sum of scale_i * change_i x

or, if LoRA i sets the norms of the rows (DoRA), with the gain g_i = magnitude_i / |W + change_i| of each row,

    y = W x + sum of scale_i * (g_i * (W x + change_i x) - W x)

so that a scale of 0 gives the original output, and the effects of several LoRAs add up. No kind needs the changed
matrix: low ranks of all LoRAs are one low rank, a Kronecker product is two small products, a gain is a factor of W x.
`fuse` adds the same changes to the weights instead.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from zcore.errors import InvalidLora
from zcore.imaging.lora.changes import Kronecker, Lora, LowRank
from zcore.imaging.lora.lora_file import FIELD
from zcore.imaging.lora.lora_keys import Shapes
from zcore.imaging.weights.quantization import is_plain, named_layers

SMALLEST_RANK = 8
"""Ranks are padded with zeros to this or to a power of two above it, so that few compiled forwards serve all."""


@dataclass(frozen=True, slots=True, eq=False)
class BoundLayer:
    """A change on its network's device; for a DoRA also the gain of each row, float32 (out,)."""

    change: LowRank | Kronecker
    gain: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class LoraWeights:
    """A LoRA prepared for one network. `sha256` is that of its file; `notes` state what of it is left out, and why.

    If it was loaded as not `strict`, that includes what does not fit the network.
    """

    name: str
    sha256: str
    layers: Mapping[str, BoundLayer]
    notes: tuple[str, ...] = ()
    strict: bool = True

    @property
    def size_bytes(self) -> int:
        """Its memory on the device."""
        tensors = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for layer in self.layers.values()
            for tensor in (*layer.change.tensors, *(() if layer.gain is None else (layer.gain,)))
        }
        return sum(tensors.values())


@dataclass(frozen=True, slots=True, eq=False)
class ScaledLora:
    """A LoRA, and the scale at which it is applied."""

    weights: LoraWeights
    scale: float


def changeable(network: nn.Module) -> Shapes:
    """Return the layers that a LoRA may change, with their shapes: every linear one."""
    return {
        name: (cast(int, layer.out_features), cast(int, layer.in_features))
        for name, layer in named_layers(network)
        if hasattr(layer, "out_features") and hasattr(layer, "in_features")
    }


def bind(lora: Lora, name: str, network: nn.Module, device: torch.device) -> LoraWeights:
    """Prepare a LoRA for this network. Raises `InvalidLora` for a DoRA on quantized weights."""
    layers: dict[str, BoundLayer] = {}
    for layer_name, layer in lora.layers.items():
        change, gain = layer.change.to(device), None
        if layer.magnitude is not None:
            weight = _plain_weight(network, layer_name, name).to(device)
            norms = (weight.float() + change.dense()).square().sum(1).sqrt()
            gain = layer.magnitude.to(device) / norms.clamp(min=torch.finfo(torch.float32).tiny)
        layers[layer_name] = BoundLayer(change, gain)
    return LoraWeights(name, lora.sha256, MappingProxyType(layers), lora.notes, lora.strict)


def adapted(network: nn.Module, loras: Sequence[ScaledLora], dtype: torch.dtype) -> nn.Module:
    """Return the network with these LoRAs, or itself if all scales are 0. `dtype` is the one it computes in."""
    factors: _Factors = cache(_factors)  # nearly all layers share them
    changes = {
        name: _AdaptedLayer(network.get_submodule(name), layers, dtype, factors)
        for name, layers in _by_layer(loras).items()
    }
    return _with_layers(network, changes) if changes else network


def fuse(network: nn.Module, loras: Sequence[ScaledLora]) -> None:
    """Add these LoRAs to the network's own weights, permanently; summed in float32 and rounded once.

    This cannot be undone: subtracting a change leaves rounding errors (in bfloat16 half a percent after ten times), so
    the original weights must be loaded again. Raises `InvalidLora` for quantized weights.
    """
    for name, layers in _by_layer(loras).items():
        weight = _plain_weight(network, name, "a fused LoRA")
        before = weight.float()
        after = before.clone()
        for layer, scale in layers:
            change = layer.change.dense().to(weight.device)
            gain = None if layer.gain is None else layer.gain.to(weight.device)[:, None]
            after += scale * (change if gain is None else gain * (before + change) - before)
        weight.data.copy_(after)


_Scaled = tuple[BoundLayer, float]
_Factors = Callable[[tuple[tuple[int, float], ...], torch.device], Tensor]


class _AdaptedLayer(nn.Module):
    """A linear layer with its LoRAs. The layer may be quantized."""

    def __init__(self, base: nn.Module, layers: Sequence[_Scaled], dtype: torch.dtype, factors: _Factors) -> None:
        super().__init__()
        self.base = base
        self._low_rank = _joined([one for one in layers if isinstance(one[0].change, LowRank)], dtype, factors)
        self._products = [
            _Product.of(layer, layer.change, scale, dtype)
            for layer, scale in layers
            if isinstance(layer.change, Kronecker)
        ]
        self._gain = _gain(layers, getattr(base, "bias", None), dtype)

    @property
    def weight(self) -> Tensor:
        """The wrapped layer's weight, from which other code reads the dtype."""
        return cast(Tensor, self.base.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        y = self.base(x)
        if self._gain is not None:
            y = self._gain.factor * y + self._gain.shift
        if self._low_rank is not None:
            y = y + self._low_rank(x)
        for product in self._products:
            y = y + product(x)
        return y


@dataclass(frozen=True, slots=True, eq=False)
class _JoinedLowRank:
    """up (factors * (down x)), with factors in float32. With a single LoRA, no matrix is copied."""

    down: Tensor  # (R, in)
    up: Tensor  # (out, R)
    factors: Tensor  # (R,)

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear((functional.linear(x, self.down) * self.factors).to(x.dtype), self.up)


@dataclass(frozen=True, slots=True, eq=False)
class _Gain:
    """A gain on the layer's product without its bias: `shift` compensates for the factor on the bias."""

    factor: Tensor  # (out,)
    shift: Tensor  # (out,)


@dataclass(frozen=True, slots=True, eq=False)
class _Product:
    """Some rows of (left ⊗ right) x, computed without the matrix."""

    left: Tensor  # (a, b)
    right: Tensor  # (c, d)
    first: int
    factor: Tensor  # (rows,), float32

    @classmethod
    def of(cls, layer: BoundLayer, change: Kronecker, scale: float, dtype: torch.dtype) -> "_Product":
        ones = torch.ones(change.count, device=change.left.device)
        factor = scale * change.factor * (ones if layer.gain is None else layer.gain)
        return cls(change.left.to(dtype), change.right.to(dtype), change.first, factor)

    def __call__(self, x: Tensor) -> Tensor:
        parts = x.reshape(*x.shape[:-1], self.left.shape[1], self.right.shape[1])  # (..., b, d)
        rows = (self.left @ functional.linear(parts, self.right)).flatten(-2)  # (..., a c)
        return (self.factor * rows.narrow(-1, self.first, self.factor.shape[0])).to(x.dtype)


def _by_layer(loras: Sequence[ScaledLora]) -> dict[str, list[_Scaled]]:
    found: dict[str, list[_Scaled]] = {}
    for lora in loras:
        if lora.scale != 0:
            for name, layer in lora.weights.layers.items():
                found.setdefault(name, []).append((layer, lora.scale))
    return found


def _joined(layers: Sequence[_Scaled], dtype: torch.dtype, factors: _Factors) -> _JoinedLowRank | None:
    """Join several low-rank changes into one; None if there are none."""
    changes = [(cast(LowRank, layer.change), layer.gain, scale) for layer, scale in layers]
    if not changes:
        return None
    downs = [change.down.to(dtype) for change, _, _ in changes]
    ups = [(change.up if gain is None else gain[:, None] * change.up.float()).to(dtype) for change, gain, _ in changes]
    rank = sum(down.shape[0] for down in downs)
    missing = max(SMALLEST_RANK, 1 << (rank - 1).bit_length()) - rank
    if missing:
        downs.append(downs[0].new_zeros(missing, downs[0].shape[1]))
        ups.append(ups[0].new_zeros(ups[0].shape[0], missing))
    parts = tuple((change.down.shape[0], scale * change.factor) for change, _, scale in changes)
    return _JoinedLowRank(
        downs[0] if len(downs) == 1 else torch.cat(downs),
        ups[0] if len(ups) == 1 else torch.cat(ups, 1),
        factors((*parts, (missing, 0.0)), downs[0].device),
    )


def _factors(parts: tuple[tuple[int, float], ...], device: torch.device) -> Tensor:
    """Repeat each number by its count."""
    return torch.tensor([number for count, number in parts for _ in range(count)], device=device)


def _gain(layers: Sequence[_Scaled], bias: Tensor | None, dtype: torch.dtype) -> _Gain | None:
    more = [scale * (layer.gain - 1.0) for layer, scale in layers if layer.gain is not None]
    if not more:
        return None
    beyond = torch.stack(more).sum(0)
    shift = torch.zeros_like(beyond) if bias is None else -beyond * bias.float().to(beyond.device)
    return _Gain((1.0 + beyond).to(dtype), shift.to(dtype))


def _with_layers(network: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """Return a network with some layers replaced, which shares everything else with the given one."""
    copied = copy.copy(network)
    children = dict(network._modules)  # pyright: ignore[reportPrivateUsage]
    for name in {path.partition(".")[0] for path in layers}:
        inner = {path.partition(".")[2]: layer for path, layer in layers.items() if path.partition(".")[0] == name}
        child = children[name]
        assert child is not None, "layers are named by their network"
        children[name] = inner[""] if "" in inner else _with_layers(child, inner)
    copied.__dict__["_modules"] = children
    return copied


def _plain_weight(network: nn.Module, layer: str, lora: str) -> Tensor:
    weight = getattr(network.get_submodule(layer), "weight", None)
    if weight is None or not is_plain(weight):
        raise InvalidLora.field(
            FIELD, f"{lora} needs the unquantized weights of {layer}; load the model without quantization"
        )
    return weight
