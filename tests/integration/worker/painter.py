"""A painter in place of the model: it tells its steps as the pipeline does, and a test decides what happens between."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from zcore.request import GenerationRequest

Between = Callable[[GenerationRequest, int], None]


@dataclass(frozen=True)
class Progress:
    """As `zcore.imaging.pipeline.Progress`, which would load torch."""

    phase: str
    step: int
    steps: int


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


@dataclass
class Painter:
    """Paints one grey; `between(request, step)` is called before each step is told."""

    between: Between = lambda _request, _step: None
    begun: list[GenerationRequest] = field(default_factory=list)
    told: list[int] = field(default_factory=list)

    def generate(self, request: GenerationRequest, on_step: Callable[[Any], None]) -> Result:
        """The pictures, step by step."""
        self.begun.append(request)
        forwards = request.steps * request.n
        for step in range(forwards):
            self.between(request, step)
            self.told.append(step)
            on_step(Progress("denoise", step, forwards))
        grey = Image.new("RGB", (request.width, request.height), (128, 128, 128))
        return Result([Picture(grey, request.seed_of(index), index) for index in range(request.n)])

    def describe(self, _request: GenerationRequest | None = None) -> dict[str, str]:
        """What it is."""
        return {"engine": "a painter for tests"}
