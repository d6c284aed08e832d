"""A memory budget that makes a CPU behave like a GPU with limited memory.

Tracks every storage that is allocated while it is active, on any device, and raises `torch.OutOfMemoryError` when the
live ones exceed the budget, as CUDA's allocator does. Earlier allocations, such as weights, do not count.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryBudget(TorchDispatchMode):
    """`peak_bytes` is the largest number of bytes that were live at once."""

    def __init__(self, budget_bytes: float) -> None:
        super().__init__()
        self._budget_bytes = budget_bytes
        self._alive: dict[int, int] = {}
        self.peak_bytes = 0

    @property
    def alive_bytes(self) -> int:
        """The bytes that were allocated inside and are still referenced."""
        return sum(self._alive.values())

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        known = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._track(tensor.untyped_storage(), known)
        return made

    def _track(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        key = storage._cdata
        if key in known or key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        weakref.finalize(storage, self._alive.pop, key, None)
        alive = self.alive_bytes
        if alive > self._budget_bytes:
            raise torch.OutOfMemoryError(f"the budget is {self._budget_bytes:.0f} bytes, but {alive} are needed")
        self.peak_bytes = max(self.peak_bytes, alive)
