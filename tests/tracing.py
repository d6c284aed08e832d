"""Peak memory of code, traced on tensors without data: every storage is tracked from allocation to release.

Takes code that computes on the meta device and reports the most bytes of its tensors that were alive at once. The real
code runs in its real order, so seconds on a CPU replace gigabytes on a card. Two things are not traced: workspaces
inside a kernel, and memory that the allocator loses to fragmentation.

Attention is counted as in fused kernels, torch's own and those of the packages: one tensor of the queries' shape. The
matrix of every token by every token, which torch makes on the meta device, is not made.
"""

import weakref
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")


class LiveStorages(TorchDispatchMode):
    """Tracks tensors made on the meta device: `peak_bytes` at once, and the kinds of tensors `at_peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.at_peak: Counter[tuple[str, tuple[int, ...], torch.dtype]] = Counter()
        self._live: dict[int, tuple[str, tuple[int, ...], torch.dtype]] = {}
        self._references: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage_of(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.device == META and _storage_of(made) not in given:
                self._track(made, str(func))
        return result

    def _track(self, tensor: Tensor, maker: str) -> None:
        storage, key, size = tensor.untyped_storage(), _storage_of(tensor), tensor.untyped_storage().nbytes()
        if key in self._live:
            return

        def release(_reference: Any) -> None:
            del self._live[key], self._references[key]
            self.live_bytes -= size

        self._live[key] = (maker, tuple(tensor.shape), tensor.dtype)
        self._references[key] = weakref.ref(storage, release)
        self.live_bytes += size
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
            self.at_peak = Counter(self._live.values())


@contextmanager
def traced() -> Generator[LiveStorages]:
    """Track the tensors that the body of the `with` statement makes.

    Not in inference mode: there torch's composite operators are dispatched whole, and tensors inside them are missed.
    """
    with torch.no_grad(), _AsOnACard(), LiveStorages() as storages:
        yield storages


class _AsOnACard(TorchFunctionMode):
    """Attention without the matrix of tokens by tokens.

    A condition on a tensor without data is true, as it is for one prompt.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        if func is Tensor.__bool__ and args[0].device == META:
            return True
        return func(*args, **(kwargs or {}))


def _storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
