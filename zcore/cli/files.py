"""The files that a command line names: read with an error that names the flag, written whole or not at all.

Takes paths; gives bytes, or a place to write to. Does not know what is in a file.
"""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from zcore.errors import InvalidRequest, StorageError


@contextmanager
def whole_file(path: Path) -> Generator[Path]:
    """Where to write. Whatever stops the writer, Ctrl-C too, leaves `path` as it was. Raises `StorageError`."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as fault:
        raise StorageError(f"{path}: cannot be written: {fault.strerror}") from fault
    finally:
        temporary.unlink(missing_ok=True)


def check_place(path: Path) -> None:
    """Raise `InvalidRequest` for a path that no file can take, before anything is computed for it."""
    if not path.parent.is_dir():
        raise InvalidRequest.field("--output", f"there is no folder {path.parent}")
    if path.is_dir():
        raise InvalidRequest.field("--output", f"{path} is a folder")


def read_given(path: Path, flag: str) -> bytes:
    """A file that a flag names. Raises `InvalidRequest`."""
    try:
        return path.read_bytes()
    except OSError as fault:
        raise InvalidRequest.field(flag, f"{path} cannot be read: {fault.strerror}") from fault
