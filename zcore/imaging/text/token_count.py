"""A formatted prompt as token ids, and how many they are.

Takes the `tokenizer/tokenizer.json` of a checkpoint; gives ids. Needs the `tokenizers` package only: the server
counts with the very object that the worker encodes with, so both always agree.

Two vocabularies are made of the one file. The layout's marks are looked up by name; text goes through a tokenizer
whose list of added tokens is empty, which therefore recognises no mark at all, however it is spelled.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from zcore.errors import CheckpointError, FieldError, PromptTooLong
from zcore.imaging.geometry import PlacementLimits
from zcore.imaging.text.formatter import CONTROLS, Control, FormattedPrompt


class _AddedToken(msgspec.Struct, frozen=True):
    content: str
    id: int


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

    def token_ids(self, prompt: FormattedPrompt) -> list[int]:
        """The prompt as the text encoder reads it. Raises `PromptTooLong` with count and limit."""
        ids = self._ids(prompt)
        if len(ids) > self.limit:
            detail = f"is {len(ids)} tokens with its template and layout; the model places at most {self.limit}"
            raise PromptTooLong([FieldError("/prompt", detail)])
        return ids

    def check(self, prompt: FormattedPrompt) -> int:
        """The number of tokens, the layout's own included. Raises `PromptTooLong` with count and limit."""
        return len(self.token_ids(prompt))

    def count(self, prompt: FormattedPrompt) -> int:
        """The number of tokens, however many."""
        return len(self._ids(prompt))

    def _ids(self, prompt: FormattedPrompt) -> list[int]:
        ids: list[int] = []
        for piece in prompt.pieces:
            if isinstance(piece, Control):
                ids.append(self._controls[piece.token])
            else:
                ids += self._text.encode(piece.text, add_special_tokens=False).ids
        return ids


def _text_tokenizer(path: Path, document: Mapping[str, msgspec.Raw]) -> Tokenizer:
    """The same tokenizer, blind to every added token; it neither cuts nor pads."""
    nothing: dict[str, Any] = {"added_tokens": [], "truncation": None, "padding": None}
    try:
        return Tokenizer.from_str(msgspec.json.encode({**document, **nothing}).decode())
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
