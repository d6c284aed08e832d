"""Reading and writing the files that a command line names.

Read errors name the flag. Written files appear complete or not at all. Independent of the content of the files.
"""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from zcore.errors import InvalidRequest, StorageError


@contextmanager
def atomic_write(path: Path) -> Generator[Path]:
    """Yield a temporary path that replaces `path` on success.

    If the writer fails or is interrupted, `path` stays as it was. Raises `StorageError` if the disk refuses.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_output_path(path: Path) -> None:
    """Raise `InvalidRequest` if no file can be written to this path. Called before the model is loaded."""
    if str(path) == "-":
        raise InvalidRequest.field("--output", "`-` (standard output) is not supported; give the path of a file")
    if not path.parent.is_dir():
        raise InvalidRequest.field("--output", f"the folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise InvalidRequest.field("--output", f"{path} is a folder; give the path of a file")


def read_file(path: Path, flag: str) -> bytes:
    """Return the content of a file that `flag` names. Raises `InvalidRequest` if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest.field(flag, f"{path} cannot be read: {error.strerror}") from error
