"""An embedding survives its file bit for bit, and any other file is refused."""

import io
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from zcore.errors import EmbeddingMismatch, InvalidRequest
from zcore.imaging.text.embedding_file import DTYPES, PromptEmbedding, check_fits, from_bytes, to_bytes

FAMILY = "a" * 64


def embedding(dtype: torch.dtype = torch.bfloat16, **changed: Any) -> PromptEmbedding:
    values = torch.randn(7, 16, generator=torch.Generator().manual_seed(3)).to(dtype)
    values[0, :4] = torch.tensor([0.0, -0.0, 6e-8, -65504.0], dtype=dtype)
    made = PromptEmbedding(
        embeds=values,
        negative=None,
        prompt_tokens=9,
        layers="-2:0.7,-5:0.3",
        encoder_family=FAMILY,
        encoder_revision="0123456789abcdef",
        long_prompt_mode="interpolate",
        prompt_sha256="b" * 64,
    )
    return replace(made, **changed)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


def origin(of: PromptEmbedding) -> tuple[Any, ...]:
    return (
        of.prompt_tokens, of.layers, of.encoder_family, of.encoder_revision, of.long_prompt_mode, of.prompt_sha256,
    )  # fmt: skip


def changed_file(tensors: dict[str, torch.Tensor] | None = None, **metadata: str | None) -> bytes:
    """Return a valid file with these changes."""
    content = to_bytes(embedding())
    header = msgspec.json.decode(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    changed = {name: value for name, value in {**header, **metadata}.items() if value is not None}
    return save(load(content) if tensors is None else tensors, changed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_negative", [False, True])
def test_an_embedding_is_read_back_bit_for_bit(dtype: torch.dtype, with_negative: bool) -> None:
    given = embedding(dtype)
    given = replace(given, negative=given.embeds[:3] if with_negative else None)
    found = from_bytes(to_bytes(given))
    assert (found.embeds.dtype, found.embeds.shape) == (dtype, given.embeds.shape)
    assert bits(found.embeds) == bits(given.embeds)
    assert origin(found) == origin(given)
    assert (found.negative is not None) == with_negative
    if found.negative is not None:
        assert bits(found.negative) == bits(given.embeds[:3])


def test_a_view_with_other_strides_is_read_back_too() -> None:
    transposed = torch.randn(16, 7).T
    read = from_bytes(to_bytes(embedding(embeds=transposed, negative=transposed)))
    assert torch.equal(read.embeds, transposed)


def test_the_same_embedding_is_the_same_file_in_any_process() -> None:
    program = (
        "import hashlib; from tests.unit.imaging.test_embedding_file import embedding, to_bytes;"
        "print(hashlib.sha256(to_bytes(embedding())).hexdigest())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True) for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout
    assert len({to_bytes(embedding()) for _ in range(5)}) == 1


def test_a_file_is_written_with_default_permissions_and_read(tmp_path: Path) -> None:
    path = tmp_path / "prompt.safetensors"
    before = os.umask(0o022)
    try:
        embedding().save(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644
    assert bits(PromptEmbedding.load(path).embeds) == bits(embedding().embeds)
    with pytest.raises(InvalidRequest, match=r"^embeddings: .*absent cannot be read: No such file"):
        PromptEmbedding.load(tmp_path / "absent")


def pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save({"embeds": torch.zeros(2, 3)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is not a safetensors file"),
        (b"hello, world", "is not a safetensors file"),
        (pickle.dumps({"embeds": [1.0]}), "is not a safetensors file"),
        (pickled(), "is not a safetensors file"),
        ((8).to_bytes(8, "little") + b"not json", "is not a safetensors file"),
        ((50_000).to_bytes(8, "little") + b'{"a":' * 10_000, "is not a safetensors file"),
        (save({"embeds": torch.zeros(2, 3)}), "is a safetensors file of another kind"),
        (save({"lora": torch.zeros(2, 3)}, {"format": "pt"}), "is a safetensors file of another kind"),
        (changed_file(version="2"), "has version 2 of its format; only version 1 is supported"),
        (changed_file(version=None), "has version None"),
        (changed_file(prompt_tokens=None), "missing required field `prompt_tokens`"),
        (changed_file(encoder_family=None), "missing required field `encoder_family`"),
        (changed_file(prompt_tokens="many"), r"Expected `int`, got `str` - at `\$.prompt_tokens`"),
        (changed_file(prompt_tokens="0"), r"`int` >= 1 - at `\$.prompt_tokens`"),
        (changed_file(prompt_sha256="a cat"), r"at `\$.prompt_sha256`"),
        (changed_file(long_prompt_mode="fold"), r"'fold' - at `\$.long_prompt_mode`"),
        (changed_file({"negative": torch.zeros(2, 3)}), r"has the tensors \['negative'\]"),
        (changed_file({"embeds": torch.zeros(2, 3), "x": torch.zeros(1)}), r"has the tensors \['embeds', 'x'\]"),
        (changed_file({"embeds": torch.zeros(2, 3, 4)}), r"embeds of shape \[2, 3, 4\]; it must be tokens by"),
        (changed_file({"embeds": torch.zeros(0, 3)}), r"embeds of shape \[0, 3\]"),
        (
            changed_file({"embeds": torch.zeros(2, 3, dtype=torch.int64)}),
            "embeds in int64; it must be one of bfloat16, float16, float32",
        ),
        (changed_file({"embeds": torch.tensor([[1.0, float("nan")]])}), "embeds with values that are not finite"),
        (changed_file({"embeds": torch.ones(2, 3), "negative": torch.tensor([[float("inf")] * 3])}), "negative with"),
        (
            changed_file({"embeds": torch.zeros(2, 3), "negative": torch.zeros(2, 4)}),
            "different dtypes or hidden sizes",
        ),
        (to_bytes(embedding())[:-1], "bytes; its header specifies .* incomplete or damaged"),
        (to_bytes(embedding()) + b"\0", "bytes; its header specifies .* incomplete or damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_any_other_file_is_refused_in_one_sentence(content: bytes, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^embeddings: .*{complaint}") as refusal:
        from_bytes(content)
    assert "\n" not in refusal.value.message
    assert [error.pointer for error in refusal.value.errors] == ["/embeddings"]


def test_text_from_a_file_is_escaped_and_shortened_in_the_error() -> None:
    content = save({"embeds": torch.ones(2, 3)}, {"format": "zimage.prompt_embedding", "version": "\0\x1b[31m" * 2000})
    with pytest.raises(InvalidRequest, match=r"has version \\u0000\\u001b\[31m") as refused:
        from_bytes(content)
    assert len(refused.value.message) < 600


def test_an_embedding_that_could_not_be_read_back_is_not_written() -> None:
    for wrong in (
        {"embeds": torch.full((1, 2), float("nan"))},
        {"prompt_tokens": 0},
        {"prompt_sha256": "a cat"},
        {"negative": torch.zeros(1, 3)},
    ):
        with pytest.raises(InvalidRequest, match=r"^embeddings: "):
            to_bytes(embedding(**wrong))


@given(st.data())
def test_a_damaged_file_is_refused_or_another_valid_one(data: st.DataObject) -> None:
    content = bytearray(to_bytes(embedding()))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = from_bytes(bytes(content))
    except InvalidRequest:
        return
    assert found.embeds.isfinite().all()


def test_an_embedding_fits_the_model_it_was_made_for() -> None:
    check_fits(embedding(), hidden_size=16, caption_tokens_limit=7, encoder_family=FAMILY)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"hidden_size": 2560}, "embeddings: has 16 numbers per token; this model needs 2560"),
        ({"caption_tokens_limit": 6}, "embeddings: has 7 tokens; this model supports at most 6"),
        (
            {"encoder_family": "c" * 64},
            "embeddings: comes from a different text encoder or tokenizer than this model's",
        ),
    ],
)
def test_an_embedding_for_another_model_is_refused_naming_the_difference(
    changed: dict[str, Any], complaint: str
) -> None:
    model = {"hidden_size": 16, "caption_tokens_limit": 7, "encoder_family": FAMILY, **changed}
    with pytest.raises(EmbeddingMismatch) as refusal:
        check_fits(embedding(), **model)
    assert refusal.value.message == complaint
    assert refusal.value.code == "embedding_mismatch"


def test_every_difference_is_named_and_a_long_negative_counts() -> None:
    long_negative = embedding(negative=torch.zeros(8, 16, dtype=torch.bfloat16))
    with pytest.raises(EmbeddingMismatch) as refusal:
        check_fits(long_negative, hidden_size=17, caption_tokens_limit=7, encoder_family="")
    assert len(refusal.value.errors) == 3
