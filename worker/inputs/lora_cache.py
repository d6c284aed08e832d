"""Cache of loaded LoRAs on the device, limited in bytes; the least recently used is evicted first.

A file that changed under the same name, or in whether it is strict, is loaded again. Does not depend on jobs. Safe to
share between threads.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from worker.inputs.lora_sources import LoraFile, LoraSource
from worker.patient_storage import Check
from zcore.errors import InvalidRequest, did_you_mean

if TYPE_CHECKING:
    from zcore.imaging.lora.adapters import LoraWeights
    from zcore.imaging.oom_fallback import OnFallback


class LoadLora(Protocol):
    """Loads a file's bytes under a name, as `ZImagePipeline.load_lora` does."""

    def __call__(self, content: bytes, name: str, on_fallback: "OnFallback", /, *, strict: bool) -> "LoraWeights":
        """Return the LoRA, without what does not fit the model unless `strict`. Raises `InvalidLora`."""
        ...


@dataclass(frozen=True, slots=True)
class _CachedLora:
    version: str
    strict: bool
    weights: "LoraWeights"

    def is_of(self, file: LoraFile) -> bool:
        """Return whether loading the file would give the same LoRA."""
        return (self.version, self.strict) == (file.version, file.strict)


class LoraCache:
    """Loads LoRAs from sources, which are searched in order, and caches the most recently used."""

    def __init__(self, sources: Sequence[LoraSource], load: LoadLora, limit_bytes: int) -> None:
        """`limit_bytes` bounds the device memory of what is cached."""
        self._sources = sources
        self._load = load
        self._limit_bytes = limit_bytes
        self._cached: OrderedDict[str, _CachedLora] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def empty(cls) -> "LoraCache":
        """Return a cache without sources."""

        def load(_content: bytes, name: str, _on_fallback: "OnFallback", /, *, strict: bool) -> "LoraWeights":
            raise AssertionError(f"no source returned {name}")

        return cls([], load, 0)

    def get(self, name: str, on_fallback: "OnFallback", check: Check) -> "LoraWeights":
        """Return a loaded LoRA. `on_fallback` receives each out-of-memory fallback step that loading it takes.

        `check` is called repeatedly while the file is read; an exception that it raises ends that.

        Raises `InvalidRequest` with similar names if no source has the name, and `InvalidLora`.
        """
        with self._lock:
            file = next((found for source in self._sources if (found := source.find(name))), None)
            cached = self._cached.pop(name, None)
            if file is None:
                raise InvalidRequest.field("loras", f"there is no LoRA `{name}`{self._suggestion(name)}")
            if cached is None or not cached.is_of(file):
                weights = self._load(file.read(check), name, on_fallback, strict=file.strict)
                cached = _CachedLora(file.version, file.strict, weights)
            self._cached[name] = cached
            self._evict()
            return cached.weights

    @property
    def cached_bytes(self) -> int:
        """Size of all cached LoRAs in device memory."""
        return sum(cached.weights.size_bytes for cached in self._cached.values())

    def _evict(self) -> None:
        while self._cached and self.cached_bytes > self._limit_bytes:
            self._cached.popitem(last=False)

    def _suggestion(self, name: str) -> str:
        known = [known_name for source in self._sources for known_name in source.names()]
        return did_you_mean(name, known, at_most=3)
