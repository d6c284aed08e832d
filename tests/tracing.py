"""How much memory code holds at once: storages followed from their making to their end, on tensors without data.

Takes code that computes on the meta device; gives the most bytes that were alive at once of what it made. The real code
runs in its real order, so seconds tell what gigabytes of a card would. What comes on top there is not seen: workspaces
inside a kernel, and what the allocator loses to fragments.

Attention is counted as fused kernels have it, torch's own and those of the packages: one tensor of the queries' shape.
The matrix of every token by every token, which torch makes on the meta device, is not made.
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
    """Follows what is made on the meta device. `peak_bytes` is the most there was at once, `at_peak` of which kinds."""

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
                self._follow(made, str(func))
        return result

    def _follow(self, tensor: Tensor, maker: str) -> None:
        storage, key, size = tensor.untyped_storage(), _storage_of(tensor), tensor.untyped_storage().nbytes()
        if key in self._live:
            return

        def gone(_reference: Any) -> None:
            del self._live[key], self._references[key]
            self.live_bytes -= size

        self._live[key] = (maker, tuple(tensor.shape), tensor.dtype)
        self._references[key] = weakref.ref(storage, gone)
        self.live_bytes += size
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
            self.at_peak = Counter(self._live.values())


@contextmanager
def traced() -> Generator[LiveStorages]:
    """Follow what is computed inside.

    Not in inference mode, where torch's composite operators come whole, and what they make inside is not seen.
    """
    with torch.no_grad(), _AsOnACard(), LiveStorages() as storages:
        yield storages


class _AsOnACard(TorchFunctionMode):
    """Attention without the matrix. Where code asks whether values without data hold, as for one prompt, they do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        if func is Tensor.__bool__ and args[0].device == META:
            return True
        return func(*args, **(kwargs or {}))


def _storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
