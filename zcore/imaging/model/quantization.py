"""Weights in fewer bits: which kinds there are, which layers get them, and how.

Takes a linear layer with plain weights; gives one whose weights are unpacked as it computes, in the arithmetic it had
before. Does not know files and devices: a packed layer is moved like any other.

| kind | a weight | bytes a weight | what packs it |
|---|---|---|---|
| `8bit` | int8, with a float32 scale for each row | 1 | torchao |
| `fp8` | float8 e4m3, with a float32 scale for each row | 1 | torchao |
| `4bit` | NF4, with a float32 scale for each 64 | 0.5625 | bitsandbytes |

NF4 are the 16 quantiles of a normal distribution: Dettmers et al., QLoRA, 2023 (arXiv 2305.14314), section 3.
"""

import logging
import re
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

Quantization = Literal["none", "8bit", "fp8", "4bit"]

NF4_GROUP = 64
"""How many weights share a scale."""

_PACKABLE = re.compile(r"(layers|noise_refiner|context_refiner)\.\d+\.(attention|feed_forward|self_attn|mlp)\..+")
_NOISY = (
    "torchao",
    "torchao.kernel.intmm",
    "torch.utils._pytree",
    "bitsandbytes.backends.cpu.ops",
    "diffusers.quantizers.torchao",
)


def packable(network: nn.Module) -> list[str]:
    """The layers that are packed: the linear ones of attention and feed forward in all blocks.

    These are 98 % of the transformer and 90 % of the text encoder. What is left computes once a step or once a prompt,
    and what it gets wrong all blocks get wrong.
    """
    named = cast(Iterable[tuple[str, nn.Module]], network.named_modules())
    return [name for name, layer in named if isinstance(layer, nn.Linear) and _PACKABLE.fullmatch(name)]


def pack(network: nn.Module, name: str, kind: Quantization) -> None:
    """Pack the weights of one `packable` layer, on the device where they are. `none` leaves it as it is."""
    if kind == "none":
        return
    layer = cast(nn.Linear, network.get_submodule(name))
    if kind == "4bit":
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, Nf4Linear(layer))
        return
    with quiet_imports():
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    # torchao would also change how inductor compiles everything else in this process.
    config = (Int8WeightOnlyConfig if kind == "8bit" else Float8WeightOnlyConfig)(set_inductor_config=False)
    quantize_(layer, config, filter_fn=None)


class Nf4Linear(nn.Module):
    """A linear layer of NF4 weights. Unlike bitsandbytes' own it changes nothing of itself when it computes."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        with quiet_imports():
            from bitsandbytes import functional as packing  # also registers the operator used below
        self.in_features, self.out_features = layer.in_features, layer.out_features
        packed, state = cast(Any, packing).quantize_4bit(layer.weight, blocksize=NF4_GROUP, quant_type="nf4")
        self.packed: Tensor
        self.scales: Tensor
        self.register_buffer("packed", packed)  # (in * out / 2, 1), two in a byte
        self.register_buffer("scales", state.absmax)  # (in * out / 64,)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        shape = (self.out_features, self.in_features)
        unpack: Callable[..., Tensor] = torch.ops.bitsandbytes.dequantize_4bit  # pyright: ignore
        return functional.linear(x, unpack(self.packed, self.scales, NF4_GROUP, "nf4", shape, x.dtype), self.bias)


def put(network: nn.Module, name: str, weight: Tensor, dtype: torch.dtype) -> None:
    """Give a network one of its weights, out of a file: in this dtype, but for blocks of GGUF in a `packable` layer,
    which stay packed and compute in it.
    """
    layer_name, _, own_name = name.rpartition(".")
    layer = network.get_submodule(layer_name)
    if not hasattr(weight, "quant_type"):
        # Copied: what is mapped from a file lies at odd addresses, and changes with the file.
        setattr(layer, own_name, nn.Parameter(weight.to(dtype, copy=True), requires_grad=False))
        return
    with quiet_imports():
        from diffusers.quantizers.gguf import utils as of_diffusers
    gguf: Any = of_diffusers
    if not _PACKABLE.fullmatch(layer_name) or cast(Any, weight).quant_type in gguf.UNQUANTIZED_TYPES:
        setattr(layer, own_name, nn.Parameter(gguf.dequantize_gguf_tensor(weight).to(dtype), requires_grad=False))
        return
    linear = cast(Any, layer)
    replaced = gguf.GGUFLinear(linear.in_features, linear.out_features, linear.bias is not None, dtype, "meta")
    replaced.weight, replaced.bias = weight, linear.bias
    parent, _, child = layer_name.rpartition(".")
    setattr(network.get_submodule(parent), child, replaced)


def shape_of(weight: Tensor) -> torch.Size:
    """Of the numbers, however they are packed."""
    return torch.Size(getattr(weight, "quant_shape", weight.shape))


def is_packed(network: nn.Module) -> bool:
    """Whether any weight is other than the numbers themselves."""
    return any(isinstance(one, Nf4Linear) for one in network.modules()) or not all(
        is_plain(weight) for weight in network.parameters()
    )


def is_plain(weight: Tensor) -> bool:
    """Whether these are the numbers themselves, to be read and added to. A packed weight says so by its type alone."""
    return type(weight) in (Tensor, nn.Parameter) and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def quiet_imports() -> Generator[None]:
    """For what imports torchao and bitsandbytes, as diffusers does: they tell which kernels they do without."""
    levels = {name: logging.getLogger(name).level for name in _NOISY}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)
            warnings.filterwarnings("ignore", ".*invalid escape sequence")  # as torchao is compiled, the first time
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
