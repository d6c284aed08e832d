"""Attention kernels behind one signature: which are supported, which can run here, and how to load one.

Takes a name and a placement; returns an `Attend`. A package is imported when its kernel is chosen.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional

from zcore.choices import AttentionBackend
from zcore.errors import CheckpointError
from zcore.imaging.weights.loader import Placement

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(queries, keys, values, mask) -> output. The tensors are (B, S, heads, head_dim); the mask is None or boolean (B, S),
true for keys that exist."""


@dataclass(frozen=True, slots=True)
class _Kernel:
    """A function of another package. All take and return (B, S, heads, head_dim), some only with the `options`."""

    package: str
    module: str
    function: str
    options: dict[str, str]


KERNELS = {
    "flash_attn_3": _Kernel("flash_attn_interface", "flash_attn_interface", "flash_attn_func", {}),
    "flash_attn_2": _Kernel("flash_attn", "flash_attn", "flash_attn_func", {}),
    "sage": _Kernel("sageattention", "sageattention", "sageattn", {"tensor_layout": "NHD"}),
    "xformers": _Kernel("xformers", "xformers.ops", "memory_efficient_attention", {}),
}


def choose_attention(wanted: str, placement: Placement) -> str:
    """Return the attention backend to use; `auto` is the first of FlashAttention 3, 2, and sdpa that can run here.

    `auto` never chooses `sage`, which computes in eight bits, or `xformers`. Raises `CheckpointError` for a backend
    that cannot run.
    """
    if wanted not in get_args(AttentionBackend):
        raise CheckpointError(
            f"attention_backend: {wanted} is not supported; use one of {', '.join(get_args(AttentionBackend))}"
        )
    if wanted == "auto":
        candidates = ("flash_attn_3", "flash_attn_2")
        return next((name for name in candidates if _kernel_fault(name, placement) is None), "sdpa")
    if wanted != "sdpa" and (fault := _kernel_fault(wanted, placement)):
        raise CheckpointError(f"attention_backend: {wanted} {fault}")
    return wanted


def attention_problems(placement: Placement) -> dict[str, str | None]:
    """Return every attention backend with the reason why it cannot run with this placement, or None if it can."""
    return {"sdpa": None, **{name: _kernel_fault(name, placement) for name in KERNELS}}


def load_attention(backend: str) -> Attend:
    """Return the function of a backend that `choose_attention` returned.

    A masked batch always uses torch's own attention, because the other kernels take no mask. Raises `CheckpointError`
    if the package cannot be imported.
    """
    if backend == "sdpa":
        return sdpa
    kernel = KERNELS[backend]
    try:
        function = getattr(importlib.import_module(kernel.module), kernel.function)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise CheckpointError(f"attention_backend: {backend}: {error}") from error
    unmasked = _opaque(backend, function, kernel.options)

    def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            return sdpa(queries, keys, values, mask)
        return unmasked(queries, keys, values)

    return attend


def sdpa(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Compute attention with torch's own kernels."""
    attended = functional.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=None if mask is None else mask[:, None, None, :],
    )
    return attended.transpose(1, 2)


def _opaque(backend: str, function: Any, options: dict[str, str]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Wrap a kernel as one operator, which a compiled graph calls without tracing it."""

    def call(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        # Some releases of FlashAttention 3 also return the logarithm of the sum.
        attended = function(queries, keys, values, **options)
        return cast(Tensor, attended[0] if isinstance(attended, tuple) else attended)

    def shape_of(queries: Tensor, _keys: Tensor, _values: Tensor) -> Tensor:
        return torch.empty_like(queries)

    operator: Any = torch.library.custom_op(f"zimage::{backend}", call, mutates_args=())
    operator.register_fake(shape_of)
    return cast(Callable[[Tensor, Tensor, Tensor], Tensor], operator)


def _kernel_fault(name: str, placement: Placement) -> str | None:
    """Return why this kernel cannot run here, or None."""
    kernel = KERNELS[name]
    if importlib.util.find_spec(kernel.package) is None:
        return f"needs the package {kernel.package}, which is not installed"
    if placement.device.type != "cuda":
        return f"needs a CUDA device; the transformer is on {placement.device}"
    if placement.dtype == torch.float32 and name != "xformers":
        return "computes in bfloat16; the transformer is in float32"
    generation = torch.cuda.get_device_capability(placement.device)
    if name == "flash_attn_3" and generation[0] != 9:
        return "needs a Hopper GPU (compute capability 9.0)"
    if generation < (8, 0):
        return "needs a GPU of compute capability 8.0 or higher"
    return None
