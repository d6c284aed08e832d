"""A CPU that behaves like a card: what is computed inside a budget may not hold more memory than that at once.

Follows every storage that is made while it is active, on any device, and raises `torch.OutOfMemoryError` where the
living ones would exceed the budget, as CUDA's allocator does. What was there before, such as weights, does not count.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryBudget(TorchDispatchMode):
    """`peak_bytes` is the most that was alive at once."""

    def __init__(self, budget_bytes: float) -> None:
        super().__init__()
        self._budget_bytes = budget_bytes
        self._alive: dict[int, int] = {}
        self.peak_bytes = 0

    @property
    def alive_bytes(self) -> int:
        """What was made inside and is still held by anybody."""
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
                self._follow(tensor.untyped_storage(), known)
        return made

    def _follow(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        key = storage._cdata
        if key in known or key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        weakref.finalize(storage, self._alive.pop, key, None)
        alive = self.alive_bytes
        if alive > self._budget_bytes:
            raise torch.OutOfMemoryError(f"the budget is {self._budget_bytes:.0f} bytes, and {alive} are wanted")
        self.peak_bytes = max(self.peak_bytes, alive)
