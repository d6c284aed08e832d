"""A prompt in the chat layout that the text encoder was trained on, kept as pieces.

Takes the user's prompt and a template's system prompt, thinking and answer; gives a `FormattedPrompt`. Needs neither
torch nor a tokenizer. The layout's own marks are `Control` pieces and everything that a person wrote is `Text`:
whoever turns this into tokens encodes `Text` with no special tokens at all, so a typed `<|im_end|>` stays ten
harmless characters.

Layout (Qwen3's chat template; the minimal case costs 8 tokens):

    <|im_start|>system LF S <|im_end|> LF <|im_start|>user LF U <|im_end|> LF <|im_start|>assistant LF

and after the assistant's line, with a think block, `<think>` LF T LF `</think>` LF LF, then the answer A. As the
model was trained there is neither block nor answer.
"""

import re
from dataclasses import dataclass
from typing import TypeVar

from zcore.imaging.text.templates import Template, TemplateLibrary
from zcore.request import GenerationRequest

MESSAGE_START = "<|im_start|>"
MESSAGE_END = "<|im_end|>"
THINK_START = "<think>"
THINK_END = "</think>"
CONTROLS = (MESSAGE_START, MESSAGE_END, THINK_START, THINK_END)
_NO_TEMPLATE = Template("", "", "", body="", add_think_block=False, thinking_content="", assistant_content="")


_Said = TypeVar("_Said")


@dataclass(frozen=True, slots=True)
class Control:
    """One of the layout's marks: exactly one token."""

    token: str


@dataclass(frozen=True, slots=True)
class Text:
    """Characters that are never a mark, whatever they spell."""

    text: str


@dataclass(frozen=True, slots=True)
class FormattedPrompt:
    """Pieces in order. No two `Text` stand side by side, because a tokenizer joins characters across such a border."""

    pieces: tuple[Control | Text, ...]

    @property
    def tail(self) -> tuple[Control | Text, ...]:
        """The layout's end: all that stands behind the user's own words."""
        assistant = max(i for i, piece in enumerate(self.pieces) if piece == Control(MESSAGE_START))
        return self.pieces[assistant - 2 :]

    def __str__(self) -> str:
        """The layout as one string, to look at. Never tokenise it: typed marks would become real ones."""
        return "".join(piece.token if isinstance(piece, Control) else piece.text for piece in self.pieces)


def format_request(request: GenerationRequest, templates: TemplateLibrary) -> FormattedPrompt:
    """The request's prompt in its layout. Raises `InvalidRequest` for a template that does not exist.

    What the request says goes before its template: only where it is silent (None) does the template speak. A request
    that wants no think block gets none of its template's either.
    """
    template = templates.get(request.template) if request.template is not None else _NO_TEMPLATE
    template_thinking = "" if request.force_think_block is False else template.thinking_content
    clean = cleaned if request.clean_whitespace else _as_it_is
    prompt = request.prompt.replace('"', "") if request.strip_quotes else request.prompt
    return format_prompt(
        clean(prompt),
        system=clean(_said(request.system_prompt, template.body)),
        thinking=clean(_said(request.thinking_content, template_thinking)),
        answer=clean(_said(request.assistant_content, template.assistant_content)),
        think_block=_said(request.force_think_block, template.add_think_block),
    )


def format_negative(request: GenerationRequest) -> FormattedPrompt:
    """The negative prompt as a plain user's message, as the official code and diffusers encode it."""
    clean = cleaned if request.clean_whitespace else _as_it_is
    return format_prompt(clean(request.negative_prompt))


def cleaned(text: str) -> str:
    """Both ends trimmed, three or more line ends as two, every run of other white space as one space."""
    lines = re.sub(r"\n{3,}", "\n\n", text.strip())
    return re.sub(r"[^\S\n]+", " ", lines)


def format_prompt(
    prompt: str, *, system: str = "", thinking: str = "", answer: str = "", think_block: bool = False
) -> FormattedPrompt:
    """The layout around one prompt. `thinking` brings its block with it; an `answer` closes the assistant's message."""
    pieces: list[Control | Text] = []
    if system:
        pieces += [*_message("system", system), Text("\n")]
    pieces += [*_message("user", prompt), Text("\n"), Control(MESSAGE_START), Text("assistant\n")]
    if thinking or think_block:
        pieces += [Control(THINK_START), Text(f"\n{thinking}\n"), Control(THINK_END), Text("\n\n")]
    if answer:
        pieces += [Text(answer), Control(MESSAGE_END)]
    return FormattedPrompt(tuple(_joined(pieces)))


def _said(by_caller: _Said | None, by_template: _Said) -> _Said:
    return by_template if by_caller is None else by_caller


def _as_it_is(text: str) -> str:
    return text


def _message(role: str, body: str) -> list[Control | Text]:
    return [Control(MESSAGE_START), Text(f"{role}\n{body}"), Control(MESSAGE_END)]


def _joined(pieces: list[Control | Text]) -> list[Control | Text]:
    """Neighbouring texts as one."""
    joined: list[Control | Text] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, Text) and isinstance(last, Text):
            joined[-1] = Text(last.text + piece.text)
        else:
            joined.append(piece)
    return joined
