"""Cache of prompts' embeddings in main memory.

When the limit in bytes is exceeded, the least recently used embedding is dropped. A key must cover everything that
determines an embedding: `key_of` computes one. A cache serves one pipeline in one thread.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """Hits and misses since the start; number of cached embeddings and their size in bytes."""

    hits: int
    misses: int
    entries: int
    held_bytes: int


class EmbeddingCache:
    """Least recently used cache. A limit of 0 bytes disables it."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._entries: OrderedDict[str, Tensor] = OrderedDict()
        self._held_bytes = 0
        self._hits = 0
        self._misses = 0

    def get(self, key: str) -> Tensor | None:
        """Return the embedding, in main memory and not to be modified, or None if it is not cached."""
        found = self._entries.get(key)
        if found is None:
            self._misses += 1
            return None
        self._hits += 1
        self._entries.move_to_end(key)
        return found

    def put(self, key: str, embedding: Tensor) -> None:
        """Store an embedding, unless it is larger than the whole limit."""
        if embedding.nbytes > self._limit_bytes:
            return
        if key in self._entries:
            self._held_bytes -= self._entries.pop(key).nbytes
        self._entries[key] = embedding.cpu()
        self._held_bytes += embedding.nbytes
        while self._held_bytes > self._limit_bytes:
            _key, oldest = self._entries.popitem(last=False)
            self._held_bytes -= oldest.nbytes

    def statistics(self) -> CacheStatistics:
        """Return the hits and misses since the start, and the current content."""
        return CacheStatistics(self._hits, self._misses, len(self._entries), self._held_bytes)


def key_of(token_ids: Sequence[int], *determined_by: str) -> str:
    """Return the SHA-256 of the tokens and of what else determines their embedding: checkpoint, layer, dtype..."""
    return hashlib.sha256("\0".join([*determined_by, ",".join(map(str, token_ids))]).encode()).hexdigest()
