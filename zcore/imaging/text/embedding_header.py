"""What an embedding file says of itself: the header of `embedding_file`'s format, read without its tensors.

Takes the bytes of a file; gives where the embedding comes from and the shapes of its tensors, or an `InvalidRequest` on
`embeddings`. Needs no torch, and reads nothing behind the header.
"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from zcore.errors import InvalidRequest
from zcore.request import LongPromptMode

FORMAT = "zimage.prompt_embedding"
VERSION = "1"
FIELD = "embeddings"
HEADER_BYTES_AT_MOST = 65_536

_Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
_Short = Annotated[str, Meta(min_length=1, max_length=4096)]


class EmbeddingOrigin(msgspec.Struct, frozen=True):
    """The header's metadata, but for format and version: the fields of `PromptEmbedding` that are no tensors."""

    prompt_tokens: Annotated[int, Meta(ge=1)]
    layers: _Short
    encoder_family: _Sha256
    encoder_revision: _Short
    long_prompt_mode: LongPromptMode
    prompt_sha256: _Sha256


class StoredTensor(msgspec.Struct, frozen=True):
    """A tensor as safetensors announces it."""

    dtype: str
    shape: tuple[int, ...]


class EmbeddingHeader(msgspec.Struct, frozen=True):
    """Where an embedding comes from, and what the file holds of it."""

    origin: EmbeddingOrigin
    tensors: dict[str, StoredTensor]


def read_header(content: bytes) -> EmbeddingHeader:
    """The header, looked at before anything of the file is trusted. Raises `InvalidRequest` on `embeddings`."""
    length = int.from_bytes(content[:8], "little")
    if not 0 < length <= min(HEADER_BYTES_AT_MOST, len(content) - 8):
        raise refused("is not a safetensors file of a prompt's embedding")
    try:
        header = msgspec.json.decode(content[8 : 8 + length], type=dict[str, dict[str, Any]])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise refused("is not a safetensors file of a prompt's embedding") from error
    metadata = header.pop("__metadata__", {})
    if metadata.get("format") != FORMAT:
        raise refused(f"is a safetensors file of something else; its header has to say the format {FORMAT}")
    if metadata.get("version") != VERSION:
        raise refused(f"is of version {metadata.get('version')} of its format; version {VERSION} is read here")
    try:
        tensors = msgspec.convert(header, dict[str, StoredTensor])
    except msgspec.ValidationError as error:
        raise refused("breaks off, or its header does not fit its tensors") from error
    return EmbeddingHeader(valid_origin(metadata), tensors)


def valid_origin(metadata: dict[str, Any]) -> EmbeddingOrigin:
    """The metadata with its types. Raises `InvalidRequest` on `embeddings`."""
    try:
        return msgspec.convert(metadata, EmbeddingOrigin, strict=False)  # numbers stand there as text
    except msgspec.ValidationError as error:
        raise refused(f"has a header that is not as it has to be: {error}") from error


def refused(complaint: str) -> InvalidRequest:
    """What is wrong with the file, on its field."""
    return InvalidRequest.field(FIELD, complaint)
