"""Stand-ins for the model: a painter that tells its steps as the pipeline does, a scribe that encodes as the prompt
encoder does, and a bell; a test decides what happens between.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from zcore.errors import InvalidRequest
from zcore.imaging.inputs import Inputs
from zcore.request import GenerationRequest
from zcore.stages import Stage

MADE_BY = {"engine": "a painter for tests"}
Between = Callable[[GenerationRequest, int], None]


@dataclass(frozen=True)
class Progress:
    """As `zcore.imaging.pipeline.Progress`, which would load torch."""

    phase: str
    step: int
    steps: int


@dataclass(frozen=True)
class Relief:
    """As `zcore.imaging.relief.Relief`, which would load torch."""

    rung: str
    sentence: str


@dataclass(frozen=True)
class Metrics:
    """As `zcore.imaging.profiler.GenerationMetrics`."""

    encode_ms: float = 1.0
    denoise_ms: float = 2.0
    decode_ms: float = 3.0
    peak_vram_mb: int = 0


@dataclass(frozen=True)
class Picture:
    """One picture."""

    image: Image.Image
    seed: int
    index: int


@dataclass(frozen=True)
class Result:
    """All pictures of a request."""

    images: list[Picture]
    metrics: Metrics = field(default_factory=Metrics)
    made_by: dict[str, str] = field(default_factory=lambda: dict(MADE_BY))


@dataclass
class Painter:
    """Paints one grey; `between(request, step)` is called before each step is told."""

    between: Between = lambda _request, _step: None
    begun: list[GenerationRequest] = field(default_factory=list)
    given: list[Inputs] = field(default_factory=list)
    told: list[int] = field(default_factory=list)
    painted_from: list[str] = field(default_factory=list)
    model: str = "a model"
    reliefs: dict[int, list[Relief]] = field(default_factory=dict)
    """What memory made it give up, before which step."""

    def generate(
        self,
        request: GenerationRequest,
        on_step: Callable[[Any], None],
        inputs: Inputs | None = None,
        on_relief: Callable[[Any], None] = lambda _relief: None,
    ) -> Result:
        """The pictures, step by step. An embedding has to be of this model."""
        embedding: Any = inputs.embedding if inputs else None
        if embedding is not None:
            if embedding.model != self.model:
                raise InvalidRequest.field("embeddings", f"were made by {embedding.model}, not by {self.model}")
            self.painted_from.append(embedding.prompt)
        self.begun.append(request)
        self.given.append(inputs)
        forwards = request.steps * request.n
        for step in range(forwards):
            self.between(request, step)
            self.told.append(step)
            for relief in self.reliefs.pop(step, ()):
                on_relief(relief)
            on_step(Progress("denoise", step, forwards))
        grey = Image.new("RGB", (request.width, request.height), (128, 128, 128))
        pictures = [Picture(grey, request.seed_of(index), index) for index in range(request.n)]
        return Result(pictures, Metrics() if embedding is None else Metrics(encode_ms=0.0))

    def load_lora(self, _content: bytes, name: str, _on_relief: Any) -> Any:
        """Tests that need LoRAs bring a shelf of their own."""
        raise AssertionError(name)

    def describe(self, _request: GenerationRequest | None = None) -> dict[str, str]:
        """What it is."""
        return dict(MADE_BY)


@dataclass(frozen=True)
class Embedding:
    """As `zcore.imaging.text.embedding_file.PromptEmbedding`, without its numbers."""

    prompt: str
    model: str


@dataclass
class Scribe:
    """Encodes in no time; `before(request)` is called first."""

    before: Callable[[GenerationRequest], None] = lambda _request: None
    encoded: list[str] = field(default_factory=list)
    model: str = "a model"

    def encode(self, request: GenerationRequest) -> Embedding:
        """The embedding of a prompt."""
        self.before(request)
        self.encoded.append(request.prompt)
        return Embedding(request.prompt, self.model)

    def describe(self) -> dict[str, str]:
        """What it is."""
        return {"encoder": "a scribe for tests"}


def write_embedding(embedding: Embedding) -> bytes:
    """As it is stored."""
    return f"{embedding.model}\n{embedding.prompt}".encode()


def read_embedding(content: bytes) -> Embedding:
    """As it was written; refuses anything else."""
    model, separator, prompt = content.decode(errors="replace").partition("\n")
    if not separator:
        raise InvalidRequest.field("embeddings", "is not a file of embeddings")
    return Embedding(prompt, model)


@dataclass
class Bell:
    """Counts its rings, by stage."""

    rung: list[Stage] = field(default_factory=list)

    def __call__(self, stage: Stage) -> None:
        self.rung.append(stage)

    @property
    def rings(self) -> int:
        """All of them."""
        return len(self.rung)
