"""A formatted prompt as token ids, and how many they are.

Takes the `tokenizer/tokenizer.json` of a checkpoint; gives ids. Needs the `tokenizers` package only: the server
counts with the very object that the worker encodes with, so both always agree.

Two vocabularies are made of the one file. The layout's marks are looked up by name; text goes through a tokenizer
whose list of added tokens is empty, which therefore recognises no mark at all, however it is spelled.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from zcore.errors import CheckpointError, FieldError, PromptTooLong
from zcore.imaging.geometry import PlacementLimits
from zcore.imaging.text.formatter import CONTROLS, Control, FormattedPrompt, Text
from zcore.request import LongPromptMode


class _AddedToken(msgspec.Struct, frozen=True):
    content: str
    id: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """A prompt's ids; the last `tail` of them are the layout's end, which is never cut off."""

    ids: list[int]
    tail: int


class TokenCounter:
    """The tokenizer of one checkpoint. Safe to share between threads: nothing in it changes."""

    def __init__(self, controls: Mapping[str, int], text: Tokenizer, limit: int) -> None:
        self._controls = controls
        self._text = text
        self.limit = limit
        """The most tokens that this checkpoint's transformer can place: 1504 for the published one."""

    @classmethod
    def load(cls, model_folder: Path) -> "TokenCounter":
        """Read a checkpoint's folder in the diffusers layout. Raises `CheckpointError`, naming the file."""
        path = model_folder / "tokenizer" / "tokenizer.json"
        try:
            document = msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
            added = msgspec.json.decode(document["added_tokens"], type=list[_AddedToken])
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        except (msgspec.DecodeError, KeyError) as error:
            raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
        controls = {token.content: token.id for token in added if token.content in CONTROLS}
        missing = [token for token in CONTROLS if token not in controls]
        if missing:
            raise CheckpointError(f"{path}: the chat layout needs the added tokens {', '.join(missing)}")
        text = _text_tokenizer(path, document)
        if any(controls[token] in text.encode(token, add_special_tokens=False).ids for token in CONTROLS):
            raise CheckpointError(f"{path}: its vocabulary spells marks of the layout, so typed ones would become real")
        return cls(controls, text, PlacementLimits.of_checkpoint(model_folder).caption_tokens)

    def tokens(self, prompt: FormattedPrompt, mode: LongPromptMode = "refuse", field: str = "prompt") -> Tokens:
        """The prompt's ids, as the text encoder is given them.

        More than the limit only where `mode` condenses their embedding later. Raises `PromptTooLong` on `field` with
        count and limit for `refuse`, and where no room is left for the prompt at all.
        """
        tail = sum(len(self._ids_of(piece)) for piece in prompt.tail)
        ids = self._ids(prompt)
        if len(ids) <= self.limit:
            return Tokens(ids, tail)
        if mode == "refuse":
            detail = f"is {len(ids)} tokens with its template and layout; the model places at most {self.limit}"
            raise PromptTooLong([FieldError(f"/{field}", detail)])
        room = room_before_tail(tail, self.limit)
        return Tokens(ids[:room] + ids[len(ids) - tail :] if mode == "truncate" else ids, tail)

    def check(self, prompt: FormattedPrompt) -> int:
        """The number of tokens, the layout's own included. Raises `PromptTooLong` with count and limit."""
        return len(self.tokens(prompt).ids)

    def count(self, prompt: FormattedPrompt) -> int:
        """The number of tokens, however many."""
        return len(self._ids(prompt))

    def _ids(self, prompt: FormattedPrompt) -> list[int]:
        return [token for piece in prompt.pieces for token in self._ids_of(piece)]

    def _ids_of(self, piece: Control | Text) -> list[int]:
        if isinstance(piece, Control):
            return [self._controls[piece.token]]
        return self._text.encode(piece.text, add_special_tokens=False).ids


def room_before_tail(tail: int, limit: int) -> int:
    """How many tokens may stand before the layout's tail. Raises `PromptTooLong` where the tail leaves no room."""
    if tail >= limit:
        detail = f"the layout behind the prompt is {tail} tokens; the model places at most {limit} in all"
        raise PromptTooLong([FieldError("/prompt", detail)])
    return limit - tail


def _text_tokenizer(path: Path, document: Mapping[str, msgspec.Raw]) -> Tokenizer:
    """The same tokenizer, blind to every added token; it neither cuts nor pads."""
    nothing: dict[str, Any] = {"added_tokens": [], "truncation": None, "padding": None}
    try:
        return Tokenizer.from_str(msgspec.json.encode({**document, **nothing}).decode())
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
