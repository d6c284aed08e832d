"""Headers of safetensors files, read without their tensors and without torch.

A file is the header's length (8 bytes, little-endian), the header (a JSON object), and the tensors' bytes. The header
maps each tensor's name to its dtype, shape, and offsets into those bytes; under `__metadata__` it may hold strings.
Format: https://github.com/huggingface/safetensors#format
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

import msgspec
from msgspec import Meta

LENGTH_BYTES = 8

LARGEST_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""

METADATA = "__metadata__"

_T = TypeVar("_T")
_Count = Annotated[int, Meta(ge=0)]


class InvalidSafetensors(ValueError):
    """The content is not a complete safetensors file. The message starts with a verb: "is not ...", "has ..."."""


class TensorEntry(msgspec.Struct, frozen=True):
    """One tensor of a file. `data_offsets` are its first byte and one past its last, counted from the header's end."""

    dtype: str
    shape: tuple[_Count, ...]
    data_offsets: tuple[_Count, _Count]


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """The tensors of a file by name, and its metadata; both may be empty."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


def read_safetensors_header(
    source: bytes | Path, largest_header_bytes: int = LARGEST_HEADER_BYTES
) -> SafetensorsHeader:
    """Return the header of a file, given as its content or its path.

    Raises `InvalidSafetensors` if the header is malformed or is longer than `largest_header_bytes` or the file, or if
    the tensors overlap, leave gaps, or do not end where the file ends. Raises `OSError` if the path cannot be read.
    """
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), len(source), largest_header_bytes)
    with source.open("rb") as file:
        return _read(file, source.stat().st_size, largest_header_bytes)


def with_sorted_header(content: bytes) -> bytes:
    """Return the file with its header's keys sorted: the safetensors library writes metadata in varying order.

    Raises `InvalidSafetensors`.
    """
    raw = _header_bytes(io.BytesIO(content), len(content), LARGEST_HEADER_BYTES)
    header = msgspec.json.encode(_decoded(raw, dict[str, Any]), order="sorted")
    padded = header.ljust(-len(header) // LENGTH_BYTES * -LENGTH_BYTES)
    return len(padded).to_bytes(LENGTH_BYTES, "little") + padded + content[LENGTH_BYTES + len(raw) :]


def _read(file: BinaryIO, file_bytes: int, largest_header_bytes: int) -> SafetensorsHeader:
    raw = _header_bytes(file, file_bytes, largest_header_bytes)
    entries = _decoded(raw, dict[str, msgspec.Raw])
    metadata = _decoded(entries.pop(METADATA, msgspec.Raw(b"{}")), dict[str, str])
    tensors = {name: _decoded(entry, TensorEntry) for name, entry in entries.items()}
    _check_offsets(tensors, LENGTH_BYTES + len(raw), file_bytes)
    return SafetensorsHeader(tensors, metadata)


def _header_bytes(file: BinaryIO, file_bytes: int, largest_header_bytes: int) -> bytes:
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    if not 0 < length <= min(largest_header_bytes, file_bytes - LENGTH_BYTES):
        raise InvalidSafetensors("is not a safetensors file")
    return file.read(length)


def _decoded(raw: bytes | msgspec.Raw, of: type[_T]) -> _T:
    try:
        return msgspec.json.decode(raw, type=of)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidSafetensors("is not a safetensors file") from error


def _check_offsets(tensors: dict[str, TensorEntry], data_start: int, file_bytes: int) -> None:
    position = 0
    for start, end in sorted(entry.data_offsets for entry in tensors.values()):
        if start != position or end < start:
            raise InvalidSafetensors("is not a safetensors file: its tensors overlap or leave gaps")
        position = end
    if data_start + position != file_bytes:
        raise InvalidSafetensors(
            f"has {file_bytes} bytes; its header specifies {data_start + position}: it is incomplete or damaged"
        )
