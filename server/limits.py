"""What a submission has to satisfy beyond its own bounds: its template exists, and its prompt fits the model.

Takes the templates and, where the checkpoint lies on this host, its tokenizer; without one the prompt is bounded in
characters by `zcore.request`, and the worker counts. Needs no torch. Does not know the database.
"""

from pathlib import Path

from zcore.imaging.text.formatter import format_request
from zcore.imaging.text.templates import TemplateLibrary
from zcore.imaging.text.token_count import TokenCounter
from zcore.request import GenerationRequest


class PromptLimit:
    """Checks prompts as the worker will read them."""

    def __init__(self, templates: TemplateLibrary, counter: TokenCounter | None) -> None:
        self._templates = templates
        self._counter = counter

    @classmethod
    def load(cls, templates_path: Path, model_location: str) -> "PromptLimit":
        """Templates are needed; a tokenizer is used where the model is a folder on this host."""
        folder = Path(model_location)
        counter = TokenCounter.load(folder) if folder.is_dir() else None
        return cls(TemplateLibrary.load(templates_path), counter)

    def check(self, request: GenerationRequest) -> None:
        """Raises `InvalidRequest` on `template` and `PromptTooLong` on `prompt`."""
        formatted = format_request(request, self._templates)
        if self._counter is not None:
            self._counter.check(formatted)
