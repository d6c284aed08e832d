"""Headers of safetensors files are read without tensors, and damaged files are refused."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save

from zcore.safetensors_header import InvalidSafetensors, TensorEntry, read_safetensors_header, with_sorted_header

TENSORS = {"weight": torch.ones(2, 3), "bias": torch.zeros(3, dtype=torch.bfloat16)}
CONTENT = save(TENSORS, {"format": "pt", "author": "ü"})
DATA_BYTES = 2 * 3 * 4 + 3 * 2


def file_of(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(start: int, end: int, **changed: Any) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end], **changed}


def test_tensors_and_metadata_are_read_from_bytes_and_from_a_path(tmp_path: Path) -> None:
    header = read_safetensors_header(CONTENT)
    assert header.metadata == {"format": "pt", "author": "ü"}
    assert {name: (one.dtype, one.shape) for name, one in header.tensors.items()} == {
        "weight": ("F32", (2, 3)),
        "bias": ("BF16", (3,)),
    }
    path = tmp_path / "one.safetensors"
    path.write_bytes(CONTENT)
    assert read_safetensors_header(path) == header


def test_a_file_without_tensors_or_metadata_is_valid() -> None:
    header = read_safetensors_header(save({}))
    assert (header.tensors, header.metadata) == ({}, {})
    assert read_safetensors_header(file_of({"empty": entry(0, 0)})).tensors == {
        "empty": TensorEntry("U8", (0,), (0, 0))
    }


def test_a_missing_path_raises_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_safetensors_header(tmp_path / "none")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x02\0\0",
        (0).to_bytes(8, "little"),
        (1000).to_bytes(8, "little") + b"{}",
        (2**63).to_bytes(8, "little") + b"{}",
        file_of(b"not json"),
        file_of(b"\xff\xfe{}"),
        file_of(b'{"\xff": {}}'),
        file_of(b'{"a":' * 100_000),
        file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        file_of([]),
        file_of({"a": 1}),
        file_of({"a": {}}),
        file_of({"a": entry(0, 1, dtype=8)}, b"\0"),
        file_of({"a": entry(0, 1, shape=[-1])}, b"\0"),
        file_of({"a": entry(0, 1, data_offsets=[0])}, b"\0"),
        file_of({"a": entry(0, 1, data_offsets=[0, 1.5])}, b"\0"),
        file_of({"a": entry(0, 1, data_offsets=[-1, 1])}, b"\0"),
        file_of({"__metadata__": {"a": 1}}),
        file_of({"__metadata__": []}),
    ],
)
def test_a_file_of_another_format_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidSafetensors, match=r"^is not a safetensors file$"):
        read_safetensors_header(content)


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": entry(0, 4), "b": entry(2, 8)},
        {"a": entry(0, 2), "b": entry(4, 8)},
        {"a": entry(1, 8)},
        {"a": entry(0, 8), "b": entry(8, 4, shape=[0])},
    ],
    ids=["overlap", "gap", "late start", "end before start"],
)
def test_tensors_that_do_not_follow_each_other_are_refused(tensors: dict[str, Any]) -> None:
    with pytest.raises(InvalidSafetensors, match="overlap or leave gaps"):
        read_safetensors_header(file_of(tensors, bytes(8)))


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"\0", CONTENT[:-DATA_BYTES]])
def test_a_file_that_is_longer_or_shorter_than_its_header_specifies_is_refused(content: bytes) -> None:
    with pytest.raises(
        InvalidSafetensors, match=f"^has {len(content)} bytes; its header specifies {len(CONTENT)}: it is incomplete"
    ):
        read_safetensors_header(content)


def test_the_headers_size_can_be_limited() -> None:
    size = len(CONTENT) - DATA_BYTES - 8
    assert read_safetensors_header(CONTENT, largest_header_bytes=size)
    with pytest.raises(InvalidSafetensors):
        read_safetensors_header(CONTENT, largest_header_bytes=size - 1)


def test_a_sorted_header_has_the_same_tensors_and_metadata_in_one_order() -> None:
    header = {"b": entry(0, 1), "__metadata__": {"y": "1", "x": "2"}, "a": entry(1, 3)}
    content = with_sorted_header(file_of(header, b"\1\2\3"))
    assert content == with_sorted_header(file_of(dict(reversed(header.items())), b"\1\2\3"))
    assert read_safetensors_header(content) == read_safetensors_header(file_of(header, b"\1\2\3"))
    assert int.from_bytes(content[:8], "little") % 8 == 0
    assert {name: one.tolist() for name, one in load(content).items()} == {"a": [2, 3], "b": [1]}
    with pytest.raises(InvalidSafetensors):
        with_sorted_header(b"nothing")


@given(st.data())
def test_no_damage_raises_another_error_or_refuses_what_the_safetensors_library_accepts(data: st.DataObject) -> None:
    damaged = bytearray(CONTENT)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(damaged)
    try:
        expected = load(content).keys()
    except SafetensorError:
        with contextlib.suppress(InvalidSafetensors):
            read_safetensors_header(content)
    else:
        assert read_safetensors_header(content).tensors.keys() == expected
