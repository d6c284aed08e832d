"""A prompt's embedding as a file: what one machine encodes, another paints from.

Takes an embedding with what decided it; gives the bytes of a safetensors file, the same for the same input, and reads
them back bit for bit. No pickle anywhere, and no text of the prompt. Whatever is not such a file is an `InvalidRequest`
on `embeddings`; one that was made for another model is an `EmbeddingMismatch`. Does not know how an embedding is
computed.

The file has the tensor `embeds` and, where there is a negative prompt, `negative`; its header's metadata has the
format's name and version and the other fields of `PromptEmbedding`, each as text.
"""

from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from zcore.errors import EmbeddingMismatch, FieldError
from zcore.imaging.text.embedding_header import (
    FIELD,
    FORMAT,
    VERSION,
    EmbeddingOrigin,
    read_header,
    refused,
    valid_origin,
)
from zcore.request import LongPromptMode

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class PromptEmbedding:
    """What conditions the transformer, and where it comes from.

    `embeds` and `negative` are (L, hidden), ready to be used: compressed already, where the prompt was too long.
    `prompt_tokens` counts before that. `layers` is one hidden state, as in `-2`, or a blend, as in `-2:0.7,-5:0.3`.
    `encoder_family` is `checkpoint.encoder_family`, `encoder_revision` names the encoder's weights, `prompt_sha256` is
    of the formatted prompt.
    """

    embeds: Tensor
    negative: Tensor | None
    prompt_tokens: int
    layers: str
    encoder_family: str
    encoder_revision: str
    long_prompt_mode: LongPromptMode
    prompt_sha256: str

    def save(self, path: Path) -> None:
        """Write the file, with the rights that any new file gets."""
        path.write_bytes(to_bytes(self))

    @classmethod
    def load(cls, path: Path) -> "PromptEmbedding":
        """Read a file. Raises `InvalidRequest` on `embeddings`."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise refused(f"{path} cannot be read: {error.strerror}") from error
        return from_bytes(content)


def to_bytes(embedding: PromptEmbedding) -> bytes:
    """The file. Raises `InvalidRequest` for an embedding that could not be read back."""
    origin = {name: str(getattr(embedding, name)) for name in EmbeddingOrigin.__struct_fields__}
    valid_origin(origin)
    tensors = {"embeds": embedding.embeds}
    if embedding.negative is not None:
        tensors["negative"] = embedding.negative
    _check_tensors(tensors)
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return _in_order(save(own, {"format": FORMAT, "version": VERSION, **origin}))


def from_bytes(content: bytes) -> PromptEmbedding:
    """What a file holds, on the CPU. Raises `InvalidRequest` on `embeddings`, in one sentence."""
    origin = read_header(content).origin
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise refused("breaks off, or its header does not fit its tensors") from error
    _check_tensors(tensors)
    return PromptEmbedding(tensors["embeds"], tensors.get("negative"), **msgspec.structs.asdict(origin))


def check_fits(embedding: PromptEmbedding, *, hidden_size: int, caption_tokens_limit: int, encoder_family: str) -> None:
    """Raise `EmbeddingMismatch`, naming each difference, where the embedding was made for another model than this."""
    faults: list[str] = []
    if embedding.encoder_family != encoder_family:
        faults.append("comes from another text encoder or tokenizer than this model's")
    rows, hidden = embedding.embeds.shape
    if hidden != hidden_size:
        faults.append(f"has {hidden} numbers a token; this model takes {hidden_size}")
    if embedding.negative is not None:
        rows = max(rows, embedding.negative.shape[0])
    if rows > caption_tokens_limit:
        faults.append(f"has {rows} tokens; this model places at most {caption_tokens_limit}")
    if faults:
        raise EmbeddingMismatch([FieldError(f"/{FIELD}", fault) for fault in faults])


def _check_tensors(tensors: dict[str, Tensor]) -> None:
    if not {"embeds"} <= tensors.keys() <= {"embeds", "negative"}:
        raise refused(f"holds the tensors {sorted(tensors)}; they have to be `embeds` and, if any, `negative`")
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise refused(f"has {name} in {_spelled(tensor.dtype)}; {', '.join(map(_spelled, DTYPES))} are taken")
        if tensor.dim() != 2 or 0 in tensor.shape:
            raise refused(f"has {name} of the shape {list(tensor.shape)}; it has to be tokens by hidden size")
        if not bool(tensor.isfinite().all()):
            raise refused(f"has {name} with values that are not finite")
    if len({(tensor.dtype, tensor.shape[1]) for tensor in tensors.values()}) > 1:
        raise refused("has embeds and negative of unlike dtype or hidden size")


def _in_order(content: bytes) -> bytes:
    """The file with its header sorted: safetensors writes metadata in another order each time."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = msgspec.json.encode(msgspec.json.decode(content[8:end]), order="sorted")
    padded = header.ljust(-len(header) // 8 * -8)
    return len(padded).to_bytes(8, "little") + padded + content[end:]


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
