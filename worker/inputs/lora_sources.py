"""Sources of LoRA files by name: a folder of the operator, and the library in the database and the storage."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from worker.abandonable import call
from worker.patient_storage import Check, PatientStorage
from zcore.errors import InputUnavailable, InvalidRequest, NotFound
from zcore.jobs import lora_library
from zcore.jobs.database import Database

SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A file that can be read. `version` changes with its content; `strict` is the argument of `load_lora`.

    `read` calls the check that it is given while it waits; an exception that the check raises ends the reading.
    """

    version: str
    read: Callable[[Check], bytes]
    strict: bool = True


class LoraSource(Protocol):
    """A place where LoRAs are found by name."""

    def names(self) -> list[str]:
        """Return the names of all LoRAs."""
        ...

    def find(self, name: str) -> LoraFile | None:
        """Return the file of a LoRA, or None if there is none."""
        ...


class LoraFolder:
    """The `.safetensors` files of a folder, named without that suffix, all strict; empty without a folder."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        """Return the names of all files, sorted."""
        return sorted(self._files())

    def find(self, name: str) -> LoraFile | None:
        """Return the file called `name`. Its version is its modification time and size."""
        path = self._files().get(name)
        if path is None:
            return None
        try:
            state = path.stat()
        except FileNotFoundError:
            return None  # deleted after it was listed, or a broken link
        return LoraFile(f"{state.st_mtime_ns} {state.st_size}", partial(_read, path))

    def _files(self) -> dict[str, Path]:
        if self._folder is None:
            return {}
        return {path.name.removesuffix(SUFFIX): path for path in self._folder.glob(f"*{SUFFIX}")}


class RegisteredLoras:
    """The library: names in the database, files in storage."""

    def __init__(self, database: Database, storage: PatientStorage) -> None:
        self._database = database
        self._storage = storage

    def names(self) -> list[str]:
        """Return the names of all registered LoRAs."""
        with self._database.read() as transaction:
            return [lora.name for lora in lora_library.list_all(transaction)]

    def find(self, name: str) -> LoraFile | None:
        """Return the registered file called `name`. Its version is its SHA-256."""
        with self._database.read() as transaction:
            lora = lora_library.find(transaction, name)
            if lora is None:
                return None
            return LoraFile(lora.sha256, partial(self._read, name, lora.storage_key), lora.strict)

    def _read(self, name: str, key: str, check: Check) -> bytes:
        """Read a registered file. Raises `InputUnavailable` if it was just removed from the library, or was lost."""
        try:
            return self._storage.get(key, check)
        except NotFound as fault:
            raise InputUnavailable("loras", f"the file of `{name}` is not in storage", retryable=True) from fault


def _read(path: Path, check: Check) -> bytes:
    """Read a file, which a network drive may never deliver.

    Raises `InvalidRequest` if it cannot be read: the operator must fix that, not the worker.
    """
    try:
        return call(path.read_bytes, check, "lora-file")
    except OSError as fault:
        raise InvalidRequest.field("loras", f"`{path.name}` cannot be read: {fault.strerror}") from fault
