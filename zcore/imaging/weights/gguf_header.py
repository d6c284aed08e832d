"""The header of a GGUF file, checked before the `gguf` package reads it.

That package reads an array of numbers beyond the end of the file, without an error, as often as the array's count says:
in a damaged file practically forever. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from pathlib import Path
from typing import BinaryIO

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a number of each type."""

_TEXT, _ARRAY = 8, 9


def check_metadata_ends(path: Path) -> None:
    """Raise `ValueError` if the metadata in the header does not end within the file. Raises `OSError`."""
    with path.open("rb") as file:
        metadata = _Metadata(file, path.stat().st_size)
        metadata.skip(len("GGUF"))
        metadata.read_byte_order()
        metadata.number("Q")  # the count of tensors
        for _ in range(metadata.number("Q")):
            metadata.skip_value(_TEXT)
            metadata.skip_value(metadata.number("I"))


class _Metadata:
    """A position in the header. Each method moves it, and raises `ValueError` if it would leave the file."""

    def __init__(self, file: BinaryIO, file_bytes: int) -> None:
        self._file = file
        self._file_bytes = file_bytes
        self._byte_order = "<"

    def read_byte_order(self) -> None:
        """Read the version, which is below 65536 in the file's own byte order."""
        if self.number("I") & 0xFFFF == 0:
            self._byte_order = ">"

    def number(self, kind: str) -> int:
        """Read a number of a type of `struct`."""
        size = struct.calcsize(f"<{kind}")
        self._check_rest(size)
        (found,) = struct.unpack(f"{self._byte_order}{kind}", self._file.read(size))
        return found

    def skip(self, size: int) -> None:
        self._check_rest(size)
        self._file.seek(size, 1)

    def skip_value(self, kind: int) -> None:
        """Skip a number, a text or an array."""
        if kind == _TEXT:
            self.skip(self.number("Q"))
        elif kind == _ARRAY:
            self._skip_array(self.number("I"), self.number("Q"))
        elif kind in _SIZES:
            self.skip(_SIZES[kind])
        else:
            raise ValueError(f"its metadata has a value of the unknown type {kind}")

    def _skip_array(self, kind: int, count: int) -> None:
        if kind in _SIZES:
            self.skip(count * _SIZES[kind])
            return
        for _ in range(count):  # each of these takes bytes of the file, so the file's end is the limit
            self.skip_value(kind)

    def _check_rest(self, size: int) -> None:
        rest = self._file_bytes - self._file.tell()
        if size > rest:
            raise ValueError(f"its metadata needs {size} more bytes where the file has {rest}: it is damaged")
