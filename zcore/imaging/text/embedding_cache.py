"""Embeddings of prompts that were asked for before.

Takes embeddings with their keys; gives them back until the bound in bytes makes it forget the one unused for longest.
Keeps them in main memory. A key has to name everything that decides an embedding: `key_of` makes one. Belongs to one
pipeline and its thread.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class CacheUse:
    """How the cache has served so far."""

    hits: int
    misses: int
    entries: int
    held_bytes: int


class EmbeddingCache:
    """Least recently used goes first. A bound of 0 keeps nothing."""

    def __init__(self, bound_bytes: int) -> None:
        self._bound_bytes = bound_bytes
        self._entries: OrderedDict[str, Tensor] = OrderedDict()
        self._held_bytes = 0
        self._hits = 0
        self._misses = 0

    def get(self, key: str) -> Tensor | None:
        """The embedding, in main memory, not to be written to; None when it has to be computed."""
        found = self._entries.get(key)
        if found is None:
            self._misses += 1
            return None
        self._hits += 1
        self._entries.move_to_end(key)
        return found

    def put(self, key: str, embedding: Tensor) -> None:
        """Keep an embedding; one larger than the whole bound is not kept."""
        if embedding.nbytes > self._bound_bytes:
            return
        if key in self._entries:
            self._held_bytes -= self._entries.pop(key).nbytes
        self._entries[key] = embedding.cpu()
        self._held_bytes += embedding.nbytes
        while self._held_bytes > self._bound_bytes:
            _key, oldest = self._entries.popitem(last=False)
            self._held_bytes -= oldest.nbytes

    def use(self) -> CacheUse:
        """Hits and misses since the start, and what is held now."""
        return CacheUse(self._hits, self._misses, len(self._entries), self._held_bytes)


def key_of(token_ids: Sequence[int], *decided_by: str) -> str:
    """SHA-256 of the tokens and of everything else that decides their embedding: checkpoint, layer, dtype, device."""
    return hashlib.sha256("\0".join([*decided_by, ",".join(map(str, token_ids))]).encode()).hexdigest()
