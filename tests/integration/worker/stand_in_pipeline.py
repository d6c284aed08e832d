"""Stand-ins for the pipeline, the prompt encoder and the notifier.

They call the same callbacks as the real ones; a test decides what happens between two steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from zcore.errors import InvalidEmbedding
from zcore.imaging.generation_inputs import Inputs
from zcore.request import GenerationRequest
from zcore.stages import Stage

MADE_BY = {"engine": "stand-in pipeline"}
BeforeStep = Callable[[GenerationRequest, int], None]


@dataclass(frozen=True)
class Progress:
    """Stand-in for `zcore.imaging.pipeline.Progress`, which would load torch."""

    phase: str
    step: int
    steps: int


@dataclass(frozen=True)
class FallbackStep:
    """Stand-in for `zcore.imaging.oom_fallback.FallbackStep`, which would load torch."""

    kind: str
    description: str
    event: str = "oom_fallback"


@dataclass(frozen=True)
class Metrics:
    """Stand-in for `zcore.imaging.metrics.GenerationMetrics`."""

    encode_ms: float = 1.0
    denoise_ms: float = 2.0
    decode_ms: float = 3.0
    peak_vram_mb: int = 0


@dataclass(frozen=True)
class CacheStatistics:
    """Stand-in for `zcore.imaging.text.embedding_cache.CacheStatistics`."""

    hits: int = 3
    misses: int = 1
    entries: int = 1
    held_bytes: int = 1024


@dataclass(frozen=True)
class GeneratedImage:
    """One image of a result."""

    image: Image.Image
    seed: int
    index: int


@dataclass(frozen=True)
class Result:
    """All images of a request."""

    images: list[GeneratedImage]
    metrics: Metrics = field(default_factory=Metrics)
    made_by: dict[str, str] = field(default_factory=lambda: dict(MADE_BY))


@dataclass
class StandInPipeline:
    """Generates gray images; calls `before_step(request, step)` before it reports each step."""

    before_step: BeforeStep = lambda _request, _step: None
    requests: list[GenerationRequest] = field(default_factory=list)
    inputs: list[Inputs] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    embedded_prompts: list[str] = field(default_factory=list)
    model: str = "a model"
    fallback_steps: dict[int, list[FallbackStep]] = field(default_factory=dict)
    """Out-of-memory fallback steps to report, by the step that they precede."""

    def generate(
        self,
        request: GenerationRequest,
        on_step: Callable[[Any], None],
        inputs: Inputs | None = None,
        on_fallback: Callable[[Any], None] = lambda _step: None,
    ) -> Result:
        """Return the images after reporting each step. Raises `InvalidEmbedding` for an embedding of another model."""
        embedding: Any = inputs.embedding if inputs else None
        if embedding is not None:
            if embedding.model != self.model:
                raise InvalidEmbedding.field("embeddings", f"were made by {embedding.model}, not by {self.model}")
            self.embedded_prompts.append(embedding.prompt)
        self.requests.append(request)
        self.inputs.append(inputs)
        forwards = request.steps * request.n
        for step in range(forwards):
            self.before_step(request, step)
            self.steps.append(step)
            for fallback_step in self.fallback_steps.pop(step, ()):
                on_fallback(fallback_step)
            on_step(Progress("denoise", step, forwards))
        gray = Image.new("RGB", (request.width, request.height), (128, 128, 128))
        images = [GeneratedImage(gray, request.seed_of(index), index) for index in range(request.n)]
        return Result(images, Metrics() if embedding is None else Metrics(encode_ms=0.0))

    def cache_statistics(self) -> CacheStatistics:
        """Return the counts that a worker reports."""
        return CacheStatistics()

    def load_lora(self, _content: bytes, name: str, _on_fallback: Any, /, *, strict: bool) -> Any:
        """Not called: tests that need LoRAs provide their own cache."""
        raise AssertionError(name)

    def describe(self, _request: GenerationRequest | None = None) -> dict[str, str]:
        """Return the description that is stored as the job's engine."""
        return dict(MADE_BY)


@dataclass(frozen=True)
class Embedding:
    """Stand-in for `zcore.imaging.text.embedding_file.PromptEmbedding`, without its numbers."""

    prompt: str
    model: str


@dataclass
class StandInEncoder:
    """Encodes prompts in no time; calls `before(request)` first."""

    before: Callable[[GenerationRequest], None] = lambda _request: None
    encoded: list[str] = field(default_factory=list)
    model: str = "a model"

    def encode(self, request: GenerationRequest) -> Embedding:
        """Return the embedding of a prompt."""
        self.before(request)
        self.encoded.append(request.prompt)
        return Embedding(request.prompt, self.model)

    def describe(self) -> dict[str, str]:
        """Return the description that is stored as the job's engine."""
        return {"encoder": "stand-in encoder"}

    def cache_statistics(self) -> CacheStatistics:
        """Return the counts that a worker reports."""
        return CacheStatistics()


def write_embedding(embedding: Embedding) -> bytes:
    """Return an embedding as bytes."""
    return f"{embedding.model}\n{embedding.prompt}".encode()


def read_embedding(content: bytes) -> Embedding:
    """Return the embedding that `write_embedding` wrote. Raises `InvalidEmbedding` for other bytes."""
    model, separator, prompt = content.decode(errors="replace").partition("\n")
    if not separator:
        raise InvalidEmbedding.field("embeddings", "is not a file of embeddings")
    return Embedding(prompt, model)


@dataclass
class Notifications:
    """Stand-in for the `Notifier` of a broker whose notifications are read at once; records their stages."""

    stages: list[Stage] = field(default_factory=list)

    def notify(self, stage: Stage) -> None:
        self.stages.append(stage)

    def notify_again(self, stage: Stage, unread: int) -> None:
        self.stages += [stage] * unread

    @property
    def count(self) -> int:
        """Number of notifications."""
        return len(self.stages)
