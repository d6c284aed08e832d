"""Checks on a submission beyond the bounds of its fields.

The template must exist, the prompt must fit the model's token limit, the named layers must exist, and web addresses
must use https. If the checkpoint is on this host, its tokenizer and configuration are used; otherwise `zcore.request`
limits the prompt in characters, and the worker counts tokens. Needs no torch. Does not use the database.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zcore.checkpoint.layer_counts import LayerCounts
from zcore.errors import FieldError, InvalidRequest, PromptTooLong
from zcore.prompt.formatter import FormattedPrompt, format_negative, format_request
from zcore.prompt.templates import TemplateLibrary
from zcore.prompt.token_count import TokenCounter
from zcore.request import INPUT_FIELDS, GenerationRequest, Submission, WebUrl, parse_input_address
from zcore.settings import WebhooksSettings


def check_web_addresses(submission: Submission, settings: WebhooksSettings) -> None:
    """Require https for input images and the webhook. Raises `InvalidRequest` with one error per field.

    Plain http is accepted if `webhooks.allow_private_addresses` is on, because then workers accept it too.
    """
    if settings.allow_private_addresses:
        return
    addresses = {name: getattr(submission.request, name) for name in INPUT_FIELDS}
    addresses["webhook_url"] = submission.delivery.webhook_url
    errors = [
        FieldError(f"/{name}", "must be an https URL; plain http is not allowed")
        for name, address in addresses.items()
        if _is_plain_http(address)
    ]
    if errors:
        raise InvalidRequest(errors)


@dataclass(frozen=True, slots=True)
class FormattedPromptReport:
    """A formatted prompt with its token counts, which are None if the tokenizer is not on this host.

    `used_tokens` is how many tokens reach the transformer; it is also None if the request would be refused.
    """

    prompt: FormattedPrompt
    tokens: int | None = None
    limit: int | None = None
    used_tokens: int | None = None


class PromptCheck:
    """Formats and checks prompts exactly as the worker does."""

    def __init__(
        self, templates: TemplateLibrary, counter: TokenCounter | None, layer_counts: LayerCounts | None
    ) -> None:
        self.templates = templates
        self._counter = counter
        self._layer_counts = layer_counts

    @classmethod
    def load(cls, templates_paths: Sequence[Path], model_location: str) -> "PromptCheck":
        """Load the templates and, if the model is a folder on this host, its tokenizer and layer counts."""
        folder, templates = Path(model_location), TemplateLibrary.load(*templates_paths)
        if not folder.is_dir():
            return cls(templates, None, None)
        return cls(templates, TokenCounter.load(folder), LayerCounts.of_checkpoint(folder))

    def check(self, request: GenerationRequest) -> None:
        """Check template, layers and prompt length.

        Raises `InvalidRequest` on an unknown template or layer, and `PromptTooLong` if `long_prompt_mode` cannot make
        the prompt fit.
        """
        if self._layer_counts is not None:
            self._layer_counts.check(request)
        formatted = format_request(request, self.templates)
        if self._counter is None:
            return
        self._counter.tokens(formatted, request.long_prompt_mode)
        if request.is_guided:
            self._counter.tokens(format_negative(request), request.long_prompt_mode, field="negative_prompt")

    def format(self, request: GenerationRequest) -> FormattedPromptReport:
        """Return the prompt as the text encoder reads it, at any length. Raises `InvalidRequest` on `template`."""
        prompt = format_request(request, self.templates)
        if self._counter is None:
            return FormattedPromptReport(prompt)
        count, limit = self._counter.count(prompt), self._counter.limit
        try:
            self._counter.tokens(prompt, request.long_prompt_mode)
        except PromptTooLong:
            return FormattedPromptReport(prompt, count, limit)
        return FormattedPromptReport(prompt, count, limit, used_tokens=min(count, limit))


def _is_plain_http(address: str | None) -> bool:
    parsed = None if address is None else parse_input_address(address)
    return isinstance(parsed, WebUrl) and not parsed.is_https
