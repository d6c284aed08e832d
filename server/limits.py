"""What a submission has to satisfy beyond its own bounds: its template exists, its prompt can be made to fit, its
layers are there, and its addresses on the web may be used.

Takes the templates and, where the checkpoint lies on this host, its tokenizer and configurations; without them the
prompt is bounded in characters by `zcore.request`, and the worker counts. Needs no torch. Does not know the database.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zcore.errors import FieldError, InvalidRequest, PromptTooLong
from zcore.imaging.model.checkpoint import Depths
from zcore.imaging.text.formatter import FormattedPrompt, format_negative, format_request
from zcore.imaging.text.templates import TemplateLibrary
from zcore.imaging.text.token_count import TokenCounter
from zcore.request import INPUT_FIELDS, GenerationRequest, Submission
from zcore.settings import WebhooksSettings


def check_web_addresses(submission: Submission, settings: WebhooksSettings) -> None:
    """Raises `InvalidRequest` for plain http, over which workers fetch and tell only where private addresses are
    allowed.
    """
    if settings.allow_private_addresses:
        return
    inputs = {name: getattr(submission.request, name) for name in INPUT_FIELDS}
    faults = [FieldError(f"/{name}", "only https is fetched here") for name, one in inputs.items() if _is_plain(one)]
    if _is_plain(submission.delivery.webhook_url):
        faults.append(FieldError("/webhook_url", "only https is told here"))
    if faults:
        raise InvalidRequest(faults)


@dataclass(frozen=True, slots=True)
class LaidOut:
    """A prompt in its layout. The counts are None where the tokenizer is not at hand.

    `kept_tokens`, what is left for the transformer, is None too where the request would be refused.
    """

    prompt: FormattedPrompt
    tokens: int | None = None
    limit: int | None = None
    kept_tokens: int | None = None


class PromptLimit:
    """Lays prompts out and checks them as the worker will read them."""

    def __init__(self, templates: TemplateLibrary, counter: TokenCounter | None, depths: Depths | None) -> None:
        self.templates = templates
        self._counter = counter
        self._depths = depths

    @classmethod
    def load(cls, templates_paths: Sequence[Path], model_location: str) -> "PromptLimit":
        """Templates are needed; the rest is used where the model is a folder on this host."""
        folder, templates = Path(model_location), TemplateLibrary.load(*templates_paths)
        if not folder.is_dir():
            return cls(templates, None, None)
        return cls(templates, TokenCounter.load(folder), Depths.of_checkpoint(folder))

    def check(self, request: GenerationRequest) -> None:
        """Raises `InvalidRequest` on `template` and layers, `PromptTooLong` where `long_prompt_mode` cannot make it
        fit.
        """
        if self._depths is not None:
            self._depths.check(request)
        formatted = format_request(request, self.templates)
        if self._counter is None:
            return
        self._counter.tokens(formatted, request.long_prompt_mode)
        if request.is_guided:
            self._counter.tokens(format_negative(request), request.long_prompt_mode, field="negative_prompt")

    def lay_out(self, request: GenerationRequest) -> LaidOut:
        """The prompt as it will be read, however long. Raises `InvalidRequest` on `template`."""
        prompt = format_request(request, self.templates)
        if self._counter is None:
            return LaidOut(prompt)
        count, limit = self._counter.count(prompt), self._counter.limit
        try:
            self._counter.tokens(prompt, request.long_prompt_mode)
        except PromptTooLong:
            return LaidOut(prompt, count, limit)
        return LaidOut(prompt, count, limit, kept_tokens=min(count, limit))


def _is_plain(address: str | None) -> bool:
    return address is not None and address.lower().startswith("http:")
