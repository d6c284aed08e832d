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

from dataclasses import dataclass

from zcore.imaging.text.templates import TemplateLibrary
from zcore.request import GenerationRequest

MESSAGE_START = "<|im_start|>"
MESSAGE_END = "<|im_end|>"
THINK_START = "<think>"
THINK_END = "</think>"
CONTROLS = (MESSAGE_START, MESSAGE_END, THINK_START, THINK_END)


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
    """The request's prompt in its template. Raises `InvalidRequest` for a template that does not exist."""
    if request.template is None:
        return format_prompt(request.prompt)
    template = templates.get(request.template)
    return format_prompt(
        request.prompt,
        system=template.body,
        thinking=template.thinking_content,
        answer=template.assistant_content,
        think_block=template.add_think_block,
    )


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
