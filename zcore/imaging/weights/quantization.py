"""Quantized weights: the supported kinds, the layers that are quantized, and how.

Takes a linear layer with plain weights; returns one that dequantizes its weights as it computes, in the dtype it had
before. A quantized layer is moved between devices like any other.

| kind | a weight | bytes per weight | library |
|---|---|---|---|
| `8bit` | int8, with a float32 scale for each row | 1 | torchao |
| `fp8` | float8 e4m3, with a float32 scale for each row | 1 | torchao |
| `4bit` | NF4, with a float32 scale for each 64 | 0.5625 | bitsandbytes |

NF4 values are the 16 quantiles of a normal distribution: Dettmers et al., QLoRA, 2023 (arXiv 2305.14314), section 3.
"""

import re
from collections.abc import Callable, Iterable
from itertools import dropwhile
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from zcore.choices import Quantization
from zcore.imaging.weights.library_modules import library_module

NF4_GROUP = 64
"""The number of weights that share a scale."""

_PACKABLE = re.compile(r"(layers|noise_refiner|context_refiner)\.\d+\.(attention|feed_forward|self_attn|mlp)\..+")


def named_layers(network: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Return every module inside a network with its name, typed."""
    return cast(Iterable[tuple[str, nn.Module]], network.named_modules())


def packable(network: nn.Module) -> list[str]:
    """Return the names of the layers to quantize: the linear ones of attention and feed forward in all blocks.

    These hold 98 % of the transformer's weights and 90 % of the text encoder's. The other layers compute once per step
    or prompt, and their errors would affect all blocks.
    """
    return [name for name, layer in named_layers(network) if isinstance(layer, nn.Linear) and _PACKABLE.fullmatch(name)]


def pack(network: nn.Module, name: str, kind: Quantization) -> None:
    """Quantize the weights of one `packable` layer, on their device. `none` changes nothing."""
    if kind == "none":
        return
    layer = cast(nn.Linear, network.get_submodule(name))
    if kind == "4bit":
        _replace(network, name, Nf4Linear(layer))
        return
    torchao = library_module("torchao.quantization")
    configuration = {"8bit": torchao.Int8WeightOnlyConfig, "fp8": torchao.Float8WeightOnlyConfig}[kind]
    # By default torchao also changes how inductor compiles everything else in this process.
    torchao.quantize_(layer, configuration(set_inductor_config=False), filter_fn=None)


class Nf4Linear(nn.Module):
    """A linear layer with NF4 weights. Unlike bitsandbytes' own, it never changes itself when it computes."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        bitsandbytes = library_module("bitsandbytes.functional")  # also registers the operator used below
        self.in_features, self.out_features = layer.in_features, layer.out_features
        packed, state = bitsandbytes.quantize_4bit(layer.weight, blocksize=NF4_GROUP, quant_type="nf4")
        self.packed: Tensor
        self.scales: Tensor
        self.register_buffer("packed", packed)  # (in * out / 2, 1), two per byte
        self.register_buffer("scales", state.absmax)  # (in * out / 64,)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        shape = (self.out_features, self.in_features)
        unpack: Callable[..., Tensor] = torch.ops.bitsandbytes.dequantize_4bit  # pyright: ignore
        return functional.linear(x, unpack(self.packed, self.scales, NF4_GROUP, "nf4", shape, x.dtype), self.bias)


def set_weight(network: nn.Module, name: str, weight: Tensor, dtype: torch.dtype) -> None:
    """Set one weight of a network to a tensor from a file, converted to `dtype`.

    Blocks of GGUF in a `packable` layer stay quantized, and the layer computes in `dtype`.
    """
    layer_name, _, own_name = name.rpartition(".")
    layer = network.get_submodule(layer_name)
    if not is_gguf(weight):
        # Copied: tensors mapped from a file have unaligned addresses, and change if the file does.
        setattr(layer, own_name, nn.Parameter(weight.to(dtype, copy=True), requires_grad=False))
        return
    gguf = library_module("diffusers.quantizers.gguf.utils")
    packable_here = isinstance(layer, nn.Linear) and own_name == "weight" and _PACKABLE.fullmatch(layer_name)
    if not packable_here or getattr(weight, "quant_type", None) in gguf.UNQUANTIZED_TYPES:
        setattr(layer, own_name, nn.Parameter(gguf.dequantize_gguf_tensor(weight).to(dtype), requires_grad=False))
        return
    _replace(network, layer_name, _gguf_linear(gguf, layer, weight, dtype))


def _gguf_linear(gguf: Any, layer: Any, weight: Tensor, dtype: torch.dtype) -> nn.Module:
    linear = gguf.GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, dtype, "meta")
    linear.weight, linear.bias = weight, layer.bias
    return linear


def is_gguf(weight: Tensor) -> bool:
    """Return whether this is diffusers' `GGUFParameter`, which holds blocks of a GGUF file."""
    return hasattr(weight, "quant_type")


def unpacked_shape(weight: Tensor) -> torch.Size:
    """Return the shape that a weight has when it is dequantized."""
    return torch.Size(getattr(weight, "quant_shape", weight.shape))


def with_leading_ones(weight: Tensor, shape: torch.Size) -> Tensor:
    """Return the weight in this shape if the two differ in leading dimensions of size 1 only, else unchanged.

    Packed weights stay packed: only their last dimension is counted in bytes.
    """
    if _without_leading_ones(unpacked_shape(weight)) != _without_leading_ones(shape) or not weight.shape:
        return weight
    return weight.reshape(*shape[:-1], weight.shape[-1])


def _without_leading_ones(shape: torch.Size) -> tuple[int, ...]:
    return tuple(dropwhile(lambda size: size == 1, shape))


def is_packed(network: nn.Module) -> bool:
    """Return whether any weight of the network is quantized."""
    return any(isinstance(module, Nf4Linear) for module in network.modules()) or not all(
        is_plain(weight) for weight in network.parameters()
    )


def is_plain(weight: Tensor) -> bool:
    """Return whether a weight can be read and added to directly. Quantized weights have other types or dtypes."""
    return type(weight) in (Tensor, nn.Parameter) and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _replace(network: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, layer)
