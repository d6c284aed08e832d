"""A prompt in the chat format that the text encoder was trained on, as a list of pieces.

Takes the user's prompt and a template's system prompt, thinking, and answer; returns a `FormattedPrompt`. Needs neither
torch nor a tokenizer. The format's own control tokens are `Control` pieces, and everything that a person wrote is
`Text`. The tokenizer encodes `Text` without any special tokens, so a typed `<|im_end|>` stays ten harmless characters.

Format (Qwen3's chat template; the minimal case costs 8 tokens):

    <|im_start|>system LF S <|im_end|> LF <|im_start|>user LF U <|im_end|> LF <|im_start|>assistant LF

A think block follows the assistant's line as `<think>` LF T LF `</think>` LF LF, then the answer A. The model was
trained with neither block nor answer.
"""

import re
from dataclasses import dataclass
from typing import TypeVar

from zcore.prompt.templates import Template, TemplateLibrary
from zcore.request import GenerationRequest

MESSAGE_START = "<|im_start|>"
MESSAGE_END = "<|im_end|>"
THINK_START = "<think>"
THINK_END = "</think>"
CONTROLS = (MESSAGE_START, MESSAGE_END, THINK_START, THINK_END)
_NO_TEMPLATE = Template("", "", "", body="", add_think_block=False, thinking_content="", assistant_content="")


_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Control:
    """One of the format's control tokens: exactly one token."""

    token: str


@dataclass(frozen=True, slots=True)
class Text:
    """Characters that never become a control token, even if they look like one."""

    text: str


@dataclass(frozen=True, slots=True)
class FormattedPrompt:
    """Pieces in order. No two `Text` are adjacent, because a tokenizer joins characters across such a boundary."""

    pieces: tuple[Control | Text, ...]

    @property
    def tail(self) -> tuple[Control | Text, ...]:
        """Everything after the user's own words: the end of the user's message and the assistant's beginning."""
        assistant = max(i for i, piece in enumerate(self.pieces) if piece == Control(MESSAGE_START))
        return self.pieces[assistant - 2 :]

    def __str__(self) -> str:
        """Format as one string, for display. Never tokenize it: typed control tokens would take effect."""
        return "".join(piece.token if isinstance(piece, Control) else piece.text for piece in self.pieces)


def format_request(request: GenerationRequest, templates: TemplateLibrary) -> FormattedPrompt:
    """Format the request's prompt. Raises `InvalidRequest` for a template that does not exist.

    A field of the request takes precedence; if it is None, the template's applies. With `force_think_block` false, the
    template's thinking is not used either.
    """
    template = templates.get(request.template) if request.template is not None else _NO_TEMPLATE
    template_thinking = "" if request.force_think_block is False else template.thinking_content
    clean = cleaned if request.clean_whitespace else _unchanged
    prompt = request.prompt.replace('"', "") if request.strip_quotes else request.prompt
    return format_prompt(
        clean(prompt),
        system=clean(_first_given(request.system_prompt, template.body)),
        thinking=clean(_first_given(request.thinking_content, template_thinking)),
        answer=clean(_first_given(request.assistant_content, template.assistant_content)),
        think_block=_first_given(request.force_think_block, template.add_think_block),
    )


def format_negative(request: GenerationRequest) -> FormattedPrompt:
    """Format the negative prompt as a plain user message, as the official code and diffusers do."""
    clean = cleaned if request.clean_whitespace else _unchanged
    return format_prompt(clean(request.negative_prompt))


def cleaned(text: str) -> str:
    """Trim both ends, reduce three or more line ends to two and every run of other white space to one space."""
    lines = re.sub(r"\n{3,}", "\n\n", text.strip())
    return re.sub(r"[^\S\n]+", " ", lines)


def format_prompt(
    prompt: str, *, system: str = "", thinking: str = "", answer: str = "", think_block: bool = False
) -> FormattedPrompt:
    """Format one prompt. `thinking` implies a think block; an `answer` closes the assistant's message."""
    pieces: list[Control | Text] = []
    if system:
        pieces += [*_message("system", system), Text("\n")]
    pieces += [*_message("user", prompt), Text("\n"), Control(MESSAGE_START), Text("assistant\n")]
    if thinking or think_block:
        pieces += [Control(THINK_START), Text(f"\n{thinking}\n"), Control(THINK_END), Text("\n\n")]
    if answer:
        pieces += [Text(answer), Control(MESSAGE_END)]
    return FormattedPrompt(tuple(_joined(pieces)))


def _first_given(by_caller: _Value | None, by_template: _Value) -> _Value:
    return by_template if by_caller is None else by_caller


def _unchanged(text: str) -> str:
    return text


def _message(role: str, body: str) -> list[Control | Text]:
    return [Control(MESSAGE_START), Text(f"{role}\n{body}"), Control(MESSAGE_END)]


def _joined(pieces: list[Control | Text]) -> list[Control | Text]:
    joined: list[Control | Text] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, Text) and isinstance(last, Text):
            joined[-1] = Text(last.text + piece.text)
        else:
            joined.append(piece)
    return joined
