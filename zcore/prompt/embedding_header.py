"""The header of an embedding file, read without its tensors.

Takes the bytes of a file in the format of `zcore.imaging.text.embedding_file`; returns where the embedding comes from
and the shapes of its tensors, or raises `InvalidEmbedding`. Needs no torch.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from zcore.errors import InvalidEmbedding
from zcore.foreign_text import excerpt
from zcore.request import LongPromptMode
from zcore.safetensors_header import InvalidSafetensors, read_safetensors_header

FORMAT = "zimage.prompt_embedding"
VERSION = "1"
FIELD = "embeddings"
LARGEST_HEADER_BYTES = 65_536
LONGEST_COMPLAINT = 500

_Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
_Short = Annotated[str, Meta(min_length=1, max_length=4096)]


class EmbeddingOrigin(msgspec.Struct, frozen=True):
    """The header's metadata without format and version: the fields of `PromptEmbedding` that are not tensors."""

    prompt_tokens: Annotated[int, Meta(ge=1)]
    layers: _Short
    encoder_family: _Sha256
    encoder_revision: _Short
    long_prompt_mode: LongPromptMode
    prompt_sha256: _Sha256


class StoredTensor(msgspec.Struct, frozen=True):
    """Dtype and shape of a tensor, from the header."""

    dtype: str
    shape: tuple[int, ...]


class EmbeddingHeader(msgspec.Struct, frozen=True):
    """Where an embedding comes from, and the tensors of the file by name."""

    origin: EmbeddingOrigin
    tensors: dict[str, StoredTensor]


def read_header(content: bytes) -> EmbeddingHeader:
    """Read the header and check it before anything else in the file is used. Raises `InvalidEmbedding`."""
    try:
        header = read_safetensors_header(content, LARGEST_HEADER_BYTES)
    except InvalidSafetensors as error:
        raise invalid_embedding(str(error)) from error
    if header.metadata.get("format") != FORMAT:
        raise invalid_embedding(f"is a safetensors file of another kind; its header must have the format {FORMAT}")
    if header.metadata.get("version") != VERSION:
        version = header.metadata.get("version")
        raise invalid_embedding(f"has version {version} of its format; only version {VERSION} is supported")
    tensors = {name: StoredTensor(entry.dtype, entry.shape) for name, entry in header.tensors.items()}
    return EmbeddingHeader(valid_origin(header.metadata), tensors)


def valid_origin(metadata: dict[str, str]) -> EmbeddingOrigin:
    """Convert the metadata to its types. Raises `InvalidEmbedding`."""
    try:
        return msgspec.convert(metadata, EmbeddingOrigin, strict=False)  # the header holds numbers as text
    except msgspec.ValidationError as error:
        raise invalid_embedding(f"has an invalid header: {error}") from error


def invalid_embedding(complaint: str) -> InvalidEmbedding:
    """Return the error for a file that cannot be used; the complaint starts with a verb and may quote the file."""
    return InvalidEmbedding.field(FIELD, excerpt(complaint, LONGEST_COMPLAINT))
