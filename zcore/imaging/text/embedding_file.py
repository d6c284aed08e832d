"""Embedding files: one machine encodes a prompt, another generates images from the file.

Takes an embedding with its origin; returns the bytes of a safetensors file, the same for the same input, and reads them
back bit for bit. The file contains neither pickled objects nor the prompt's text. Any other file raises
`InvalidEmbedding`; one made for another model raises `EmbeddingMismatch`.

The file has the tensor `embeds` and, if there is a negative prompt, `negative`. Its header's metadata has the format's
name and version and the other fields of `PromptEmbedding`, each as text.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load, save
from torch import Tensor

from zcore.errors import EmbeddingMismatch, FieldError
from zcore.imaging.weights.loader import dtype_name
from zcore.prompt.embedding_header import (
    FIELD,
    FORMAT,
    VERSION,
    EmbeddingOrigin,
    invalid_embedding,
    read_header,
    valid_origin,
)
from zcore.request import LongPromptMode
from zcore.safetensors_header import with_sorted_header

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class PromptEmbedding:
    """A prompt's embedding, which conditions the transformer, and its origin.

    `embeds` and `negative` are (L, hidden), ready to use: long prompts are already compressed. `prompt_tokens` counts
    the tokens before that. `layers` is one hidden state, as in `-2`, or a blend, as in `-5:0.3,-2:0.7`.
    `encoder_family` comes from `zcore.checkpoint.files.encoder_family`, `encoder_revision` identifies the encoder's
    weights, and `prompt_sha256` covers the formatted prompt.
    """

    embeds: Tensor
    negative: Tensor | None
    prompt_tokens: int
    layers: str
    encoder_family: str
    encoder_revision: str
    long_prompt_mode: LongPromptMode
    prompt_sha256: str

    @classmethod
    def from_tensor(
        cls, embeds: Tensor, negative: Tensor | None = None, *, encoder_family: str, layers: str = "unknown"
    ) -> "PromptEmbedding":
        """Return the embedding that another program computed: (L, hidden), as `prompt_embeds` of diffusers.

        `encoder_family` states which text encoder computed it; `ZImagePipeline.encoder_family` is the one that a
        pipeline needs. `prompt_sha256` covers the numbers, since the prompt is not known. Raises `InvalidEmbedding` for
        a tensor of another shape or dtype.
        """
        tensors = {"embeds": embeds} if negative is None else {"embeds": embeds, "negative": negative}
        _check_tensors(tensors)
        numbers = embeds.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
        return cls(
            embeds=embeds,
            negative=negative,
            prompt_tokens=embeds.shape[0],
            layers=layers,
            encoder_family=encoder_family,
            encoder_revision="unknown",
            long_prompt_mode="refuse",
            prompt_sha256=hashlib.sha256(numbers).hexdigest(),
        )

    def save(self, path: str | Path) -> None:
        """Write the embedding to a file with default permissions."""
        Path(path).write_bytes(to_bytes(self))

    @classmethod
    def load(cls, path: str | Path) -> "PromptEmbedding":
        """Read a file. Raises `InvalidEmbedding`."""
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise invalid_embedding(f"{path} cannot be read: {error.strerror}") from error
        return from_bytes(content)


def to_bytes(embedding: PromptEmbedding) -> bytes:
    """Return the file's content. Raises `InvalidRequest` for an embedding that could not be read back."""
    origin = {name: str(getattr(embedding, name)) for name in EmbeddingOrigin.__struct_fields__}
    valid_origin(origin)
    tensors = {"embeds": embedding.embeds}
    if embedding.negative is not None:
        tensors["negative"] = embedding.negative
    _check_tensors(tensors)
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return with_sorted_header(save(own, {"format": FORMAT, "version": VERSION, **origin}))


def from_bytes(content: bytes) -> PromptEmbedding:
    """Return the embedding in a file, on the CPU. Raises `InvalidEmbedding` with a one-sentence message."""
    origin = read_header(content).origin
    try:
        tensors = load(content)
    except Exception as error:  # torch raises many kinds, for instance for 65 dimensions
        raise invalid_embedding("has a header that does not match its tensors") from error
    _check_tensors(tensors)
    return PromptEmbedding(tensors["embeds"], tensors.get("negative"), **msgspec.structs.asdict(origin))


def check_fits(embedding: PromptEmbedding, *, hidden_size: int, caption_tokens_limit: int, encoder_family: str) -> None:
    """Raise `EmbeddingMismatch`, naming each difference, if the embedding was made for another model than this."""
    faults: list[str] = []
    if embedding.encoder_family != encoder_family:
        faults.append("comes from a different text encoder or tokenizer than this model's")
    rows, hidden = embedding.embeds.shape
    if hidden != hidden_size:
        faults.append(f"has {hidden} numbers per token; this model needs {hidden_size}")
    if embedding.negative is not None:
        rows = max(rows, embedding.negative.shape[0])
    if rows > caption_tokens_limit:
        faults.append(f"has {rows} tokens; this model supports at most {caption_tokens_limit}")
    if faults:
        raise EmbeddingMismatch([FieldError(f"/{FIELD}", fault) for fault in faults])


def _check_tensors(tensors: dict[str, Tensor]) -> None:
    if not {"embeds"} <= tensors.keys() <= {"embeds", "negative"}:
        raise invalid_embedding(
            f"has the tensors {sorted(tensors)}; only `embeds` and optionally `negative` are allowed"
        )
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance] from callers without types
            raise invalid_embedding(f"has {name} that is no torch tensor; it must be one of tokens by hidden size")
        if tensor.dtype not in DTYPES:
            allowed = ", ".join(map(dtype_name, DTYPES))
            raise invalid_embedding(f"has {name} in {dtype_name(tensor.dtype)}; it must be one of {allowed}")
        if tensor.dim() != 2 or 0 in tensor.shape:
            raise invalid_embedding(f"has {name} of shape {list(tensor.shape)}; it must be tokens by hidden size")
        if not bool(tensor.isfinite().all()):
            raise invalid_embedding(f"has {name} with values that are not finite")
    if len({(tensor.dtype, tensor.shape[1]) for tensor in tensors.values()}) > 1:
        raise invalid_embedding("has embeds and negative of different dtypes or hidden sizes")
