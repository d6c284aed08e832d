"""The LoRAs that this worker's jobs may name, and the last of them ready on the device.

Takes sources of files by name and how a file is made ready; gives `LoraWeights`, kept within a bound of bytes, the
longest unused given up first. A file that changed under its name is read anew. Safe to share between threads. Does not
know jobs.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from zcore.errors import InputUnavailable, InvalidRequest, NotFound, did_you_mean
from zcore.jobs import loras
from zcore.jobs.database import Database
from zcore.storage import Storage

if TYPE_CHECKING:
    from zcore.imaging.model.lora import LoraWeights
    from zcore.imaging.relief import OnRelief

SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A file that can be read. `version` is another when its content is."""

    version: str
    read: Callable[[], bytes]


class LoraSource(Protocol):
    """Where LoRAs are found by name: a folder, or the library in the database and the storage."""

    def names(self) -> list[str]:
        """All there are."""
        ...

    def find(self, name: str) -> LoraFile | None:
        """The file of one, if it is there."""
        ...


class FolderOfLoras:
    """The `.safetensors` files of a folder, by their names without that; none where there is no folder."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        return sorted(self._files())

    def find(self, name: str) -> LoraFile | None:
        path = self._files().get(name)
        if path is None:
            return None
        try:
            state = path.stat()
        except FileNotFoundError:
            return None  # it went after it was listed, or is a link to nothing
        return LoraFile(f"{state.st_mtime_ns} {state.st_size}", partial(_read, path))

    def _files(self) -> dict[str, Path]:
        if self._folder is None:
            return {}
        return {path.name.removesuffix(SUFFIX): path for path in self._folder.glob(f"*{SUFFIX}")}


class RegisteredLoras:
    """The library: names in the record, files in storage."""

    def __init__(self, database: Database, storage: Storage) -> None:
        self._database = database
        self._storage = storage

    def names(self) -> list[str]:
        with self._database.read() as transaction:
            return [lora.name for lora in loras.listed(transaction)]

    def find(self, name: str) -> LoraFile | None:
        with self._database.read() as transaction:
            lora = loras.find(transaction, name)
            return None if lora is None else LoraFile(lora.sha256, partial(self._stored, name, lora.storage_key))

    def _stored(self, name: str, key: str) -> bytes:
        """Raises `InputUnavailable` for a file that is gone: taken from the library a moment ago, or lost."""
        try:
            return self._storage.get(key)
        except NotFound as fault:
            raise InputUnavailable("loras", f"the file of `{name}` is not in storage", retryable=True) from fault


def _read(path: Path) -> bytes:
    """Raises `InvalidRequest`: a file that the operator left unreadable must not look like a defect of the worker."""
    try:
        return path.read_bytes()
    except OSError as fault:
        raise InvalidRequest.field("loras", f"`{path.name}` cannot be read: {fault.strerror}") from fault


@dataclass(frozen=True, slots=True)
class _Kept:
    version: str
    weights: "LoraWeights"


class LoraShelf:
    """Sources in the order in which they are asked, and what was wanted last."""

    def __init__(
        self, sources: Sequence[LoraSource], load: "Callable[[bytes, str, OnRelief], LoraWeights]", limit_bytes: int
    ) -> None:
        """`load` makes a file's bytes ready under a name, as `ZImagePipeline.load_lora` does."""
        self._sources = sources
        self._load = load
        self._limit_bytes = limit_bytes
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._turn = threading.Lock()

    @classmethod
    def empty(cls) -> "LoraShelf":
        """No LoRA at all."""

        def nothing(_content: bytes, name: str, _on_relief: "OnRelief") -> "LoraWeights":
            raise AssertionError(f"no source gave {name}")

        return cls([], nothing, 0)

    def get(self, name: str, on_relief: "OnRelief") -> "LoraWeights":
        """A LoRA, ready; `on_relief` is told what memory made the pipeline give up for it.

        Raises `InvalidRequest` for a name that is nowhere, naming near ones, and `InvalidLora`.
        """
        with self._turn:
            file = next((found for source in self._sources if (found := source.find(name))), None)
            kept = self._kept.pop(name, None)
            if file is None:
                raise InvalidRequest.field("loras", f"there is no LoRA `{name}`{self._near(name)}")
            if kept is None or kept.version != file.version:
                kept = _Kept(file.version, self._load(file.read(), name, on_relief))
            self._kept[name] = kept
            self._make_room()
            return kept.weights

    @property
    def kept_bytes(self) -> int:
        """What is kept, in bytes of the device."""
        return sum(kept.weights.size_bytes for kept in self._kept.values())

    def _make_room(self) -> None:
        while self._kept and self.kept_bytes > self._limit_bytes:
            self._kept.popitem(last=False)

    def _near(self, name: str) -> str:
        known = [one for source in self._sources for one in source.names()]
        return did_you_mean(name, known, at_most=3)
