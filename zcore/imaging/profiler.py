"""What a loaded model costs: the time of each phase over several warm runs, and the peak of memory.

Takes a loaded pipeline or text encoder and a request; returns frozen values. Loads nothing and prints nothing. Wants an
embedding cache of 0 bytes, since a cached embedding costs no time.
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from zcore.imaging.pipeline import ZImagePipeline
from zcore.imaging.prompt_encoder import PromptEncoder
from zcore.imaging.result import GenerationMetrics, PhaseTimer
from zcore.imaging.sampling.multipass import plan
from zcore.request import GenerationRequest

OnRun = Callable[[int], None]
"""Called with the number of the run that begins; 0 is the warm-up."""

APPLIED = (
    "device",
    "attention_backend",
    "compiled",
    "transformer_dtype",
    "transformer_quantization",
    "encoder_device",
    "encoder_dtype",
    "encoder_quantization",
)
"""What a loaded model says about its arithmetic, of all that `describe` returns."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and extremes of the measured runs."""

    median: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Return the spread of these values, at least one."""
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """`cuda`: `torch.cuda.max_memory_allocated` while generating. `process`: resident memory, loading included."""

    size_bytes: int
    kind: Literal["cuda", "process"]


@dataclass(frozen=True, slots=True)
class Measurement:
    """Cost of one image, or of one prompt if only the text encoder was measured.

    `applied` is what the loaded model says about itself (`APPLIED`). `milliseconds` maps `encode`, `denoise`, `decode`,
    `generate` (the two before), `total` and `step` (`denoise` over the number of steps) to the spread over `runs`,
    which follow one run to warm up. `fallbacks` describes what memory made the model give up, which makes it slower.
    """

    applied: dict[str, str]
    runs: int
    warm_up_ms: float
    milliseconds: dict[str, Spread]
    peak_memory: PeakMemory
    fallbacks: tuple[str, ...] = ()


def measure_encoding(
    encoder: PromptEncoder, request: GenerationRequest, runs: int, on_run: OnRun = lambda _number: None
) -> Measurement:
    """Measure the encoding of the request's prompt. Raises as `PromptEncoder.encode` does."""

    def encode() -> GenerationMetrics:
        timer = PhaseTimer({encoder.device})
        with timer.phase("encode"):
            embedding = encoder.encode(request)
        return timer.metrics(embedding.prompt_tokens, embedding.embeds.shape[0])

    warm_up_ms, metrics = _run(encode, runs, on_run)
    return Measurement(
        applied=_applied(encoder.describe()),
        runs=runs,
        warm_up_ms=warm_up_ms,
        milliseconds={"encode": Spread.of(one.encode_ms for one in metrics[1:])},
        peak_memory=_peak_memory(metrics),
    )


def measure_generation(
    pipeline: ZImagePipeline, request: GenerationRequest, runs: int, on_run: OnRun = lambda _number: None
) -> tuple[Measurement, Image.Image]:
    """Measure the generation of the request's one image, and return the image. Raises as `pipeline.generate` does."""
    fallbacks: dict[str, None] = {}
    images: list[Image.Image] = []

    def generate() -> GenerationMetrics:
        result = pipeline.generate(request, on_fallback=lambda step: fallbacks.setdefault(step.description))
        images[:] = [result.images[0].image]
        return result.metrics

    warm_up_ms, metrics = _run(generate, runs, on_run)
    steps = sum(one.forwards for one in plan(request))
    measured = metrics[1:]
    measurement = Measurement(
        applied=_applied(pipeline.describe()),
        runs=runs,
        warm_up_ms=warm_up_ms,
        milliseconds={
            "encode": Spread.of(one.encode_ms for one in measured),
            "denoise": Spread.of(one.denoise_ms for one in measured),
            "decode": Spread.of(one.decode_ms for one in measured),
            "generate": Spread.of(one.denoise_ms + one.decode_ms for one in measured),
            "total": Spread.of(one.encode_ms + one.denoise_ms + one.decode_ms for one in measured),
            "step": Spread.of(one.denoise_ms / steps for one in measured),
        },
        peak_memory=_peak_memory(metrics),
        fallbacks=tuple(fallbacks),
    )
    return measurement, images[0]


def _run(work: Callable[[], GenerationMetrics], runs: int, on_run: OnRun) -> tuple[float, list[GenerationMetrics]]:
    """Run once to warm up and then `runs` times: the milliseconds of the first, and the metrics of all."""
    on_run(0)
    started_at = time.perf_counter()
    metrics = [work()]
    warm_up_ms = (time.perf_counter() - started_at) * 1000
    for number in range(1, runs + 1):
        on_run(number)
        metrics.append(work())
    return warm_up_ms, metrics


def _applied(described: dict[str, str]) -> dict[str, str]:
    return {name: described[name] for name in APPLIED if name in described}


def _peak_memory(metrics: list[GenerationMetrics]) -> PeakMemory:
    on_devices = max(one.peak_vram_mb for one in metrics) * 2**20
    return PeakMemory(on_devices, "cuda") if on_devices else PeakMemory(_process_peak_bytes(), "process")


def _process_peak_bytes() -> int:
    """Return the largest resident memory that this process has had.

    `getrusage` would count the parent's on Linux, where it survives the start of another program.
    """
    if sys.platform == "linux":
        with open("/proc/self/status", encoding="ascii") as file:
            sizes = dict(line.split(":", 1) for line in file)
        return int(sizes["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
