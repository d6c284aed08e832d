"""Token ids of a formatted prompt, and their number.

Takes the `tokenizer/tokenizer.json` of a checkpoint. Needs only the `tokenizers` package: the server counts with the
same class that the worker encodes with, so both always agree.

The file yields two vocabularies. Control tokens are looked up by name. Text goes through a tokenizer whose list of
added tokens is empty, so no text can become a control token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from zcore.checkpoint.geometry import PlacementLimits
from zcore.errors import CheckpointError, FieldError, PromptTooLong
from zcore.prompt.formatter import CONTROLS, Control, FormattedPrompt, Text
from zcore.request import LongPromptMode


class _AddedToken(msgspec.Struct, frozen=True):
    content: str
    id: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """A prompt's ids; the last `tail` of them, the end of the chat format, are never cut off."""

    ids: list[int]
    tail: int


class TokenCounter:
    """The tokenizer of one checkpoint. Threads may share it: it is immutable."""

    def __init__(self, controls: Mapping[str, int], text: Tokenizer, limit: int) -> None:
        self._controls = controls
        self._text = text
        self.limit = limit
        """The most tokens that this checkpoint's transformer supports: 1504 for the published one."""

    @classmethod
    def load(cls, model_folder: Path) -> "TokenCounter":
        """Read a checkpoint's folder in the diffusers layout. Raises `CheckpointError` naming the file."""
        path = model_folder / "tokenizer" / "tokenizer.json"
        try:
            document = msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
            added = msgspec.json.decode(document["added_tokens"], type=list[_AddedToken])
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        except (msgspec.DecodeError, KeyError) as error:
            raise CheckpointError(f"{path} is not a valid tokenizer: {error}") from error
        controls = {token.content: token.id for token in added if token.content in CONTROLS}
        missing = [token for token in CONTROLS if token not in controls]
        if missing:
            raise CheckpointError(f"{path}: the chat format needs the added tokens {', '.join(missing)}")
        text = _text_tokenizer(path, document)
        if any(controls[token] in text.encode(token, add_special_tokens=False).ids for token in CONTROLS):
            raise CheckpointError(f"{path}: its vocabulary contains control tokens, so typed ones would take effect")
        return cls(controls, text, PlacementLimits.of_checkpoint(model_folder).caption_tokens)

    def tokens(self, prompt: FormattedPrompt, mode: LongPromptMode = "refuse", field: str = "prompt") -> Tokens:
        """Return the prompt's ids, as the text encoder takes them.

        They exceed the limit only if `mode` compresses their embedding later. Raises `PromptTooLong` on `field`, with
        count and limit, for the mode `refuse`, and if the chat format leaves no tokens for the prompt.
        """
        tail = sum(len(self._ids_of(piece)) for piece in prompt.tail)
        ids = self._ids(prompt)
        if len(ids) <= self.limit:
            return Tokens(ids, tail)
        if mode == "refuse":
            detail = (
                f"is {len(ids)} tokens long with its template and chat format; the model supports at most {self.limit}"
            )
            raise PromptTooLong([FieldError(f"/{field}", detail)])
        before_tail = tokens_before_tail(tail, self.limit)
        return Tokens(ids[:before_tail] + ids[len(ids) - tail :] if mode == "truncate" else ids, tail)

    def count(self, prompt: FormattedPrompt) -> int:
        """Return the number of tokens, even above the limit."""
        return len(self._ids(prompt))

    def _ids(self, prompt: FormattedPrompt) -> list[int]:
        return [token for piece in prompt.pieces for token in self._ids_of(piece)]

    def _ids_of(self, piece: Control | Text) -> list[int]:
        if isinstance(piece, Control):
            return [self._controls[piece.token]]
        return self._text.encode(piece.text, add_special_tokens=False).ids


def tokens_before_tail(tail: int, limit: int) -> int:
    """Return how many tokens fit before the tail. Raises `PromptTooLong` if the tail alone reaches the limit."""
    if tail >= limit:
        detail = f"is followed by {tail} tokens of template and chat format; at most {limit} in total are supported"
        raise PromptTooLong([FieldError("/prompt", detail)])
    return limit - tail


def _text_tokenizer(path: Path, document: Mapping[str, msgspec.Raw]) -> Tokenizer:
    """Return the same tokenizer without added tokens, truncation, and padding."""
    nothing: dict[str, Any] = {"added_tokens": [], "truncation": None, "padding": None}
    try:
        return Tokenizer.from_str(msgspec.json.encode({**document, **nothing}).decode())
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise CheckpointError(f"{path} is not a valid tokenizer: {error}") from error
