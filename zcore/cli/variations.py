"""Variations of a configuration, each loaded and measured in a process of its own.

A new process has no compiled code, cached memory or peak of the variation before, and one that fails, or is killed for
its memory, ends neither the others nor the command. Importing this module loads torch.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import product
from typing import get_args

from PIL import Image

from zcore.choices import Quantization
from zcore.errors import CheckpointError, ZImageError
from zcore.imaging.from_settings import load_options
from zcore.imaging.kernels.attention import attention_problems, choose_attention
from zcore.imaging.options import LoadOptions
from zcore.imaging.pipeline import ZImagePipeline
from zcore.imaging.profiler import Measurement, OnRun, measure_encoding, measure_generation
from zcore.imaging.prompt_encoder import PromptEncoder
from zcore.request import GenerationRequest
from zcore.settings import Settings

DIED = "its process ended without a result, as it does when the system runs out of memory"


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured: a checkpoint, how it is loaded, the request, and the number of runs."""

    model_path: str
    options: LoadOptions
    request: GenerationRequest
    runs: int

    @classmethod
    def of(cls, settings: Settings, request: GenerationRequest, runs: int) -> "Subject":
        """Return what the settings load, without the cache that would hide the cost of encoding."""
        options = load_options(settings)
        uncached = replace(options, encoder=replace(options.encoder, embedding_cache_bytes=0))
        return cls(settings.model_location, uncached, request, runs)


@dataclass(frozen=True, slots=True)
class Variation:
    """What a sweep varies, all of it about the transformer."""

    attention_backend: str
    compile: bool
    quantization: Quantization


@dataclass(frozen=True, slots=True)
class Outcome:
    """A variation with its measurement and image, or with the reason why it has none."""

    variation: Variation
    measurement: Measurement | None = None
    image: Image.Image | None = None
    problem: str | None = None


def measure(subject: Subject, tests: Sequence[str], on_run: OnRun) -> Measurement:
    """Load the model in this process and measure it. Without the test `generate` only the text encoder is loaded.

    Raises `ZImageError`.
    """
    if "generate" not in tests:
        encoder = PromptEncoder.load(subject.model_path, subject.options.encoder)
        return measure_encoding(encoder, subject.request, subject.runs, on_run)
    pipeline = ZImagePipeline.load(subject.model_path, subject.options)
    return measure_generation(pipeline, subject.request, subject.runs, on_run)[0]


def backend_problems(options: LoadOptions) -> dict[str, str]:
    """Return the attention backends that cannot run where the transformer computes, with the reason."""
    problems = attention_problems(options.transformer_placement())
    return {name: problem for name, problem in problems.items() if problem is not None}


def all_variations(
    options: LoadOptions, backend: str | None, compiled: bool | None, quantization: Quantization | None
) -> list[Variation]:
    """Return every combination that may run; an argument that is not None fixes what it names."""
    placement = options.transformer_placement()
    backends = [name for name, problem in attention_problems(placement).items() if problem is None]
    if backend:  # tried even if it cannot run: its variations then have the reason
        backends = [choose_attention(backend, placement) if backend == "auto" else backend]
    compilations = (False, True) if compiled is None else (compiled,)
    quantizations = (quantization,) if quantization else get_args(Quantization)
    return [Variation(*choices) for choices in product(backends, compilations, quantizations)]


def backend_variations(options: LoadOptions) -> list[Variation]:
    """Return the configuration with each attention backend that can run, `sdpa` first."""
    return all_variations(options, None, options.compile, options.transformer_quantization)


def measure_each(
    subject: Subject, variations: Iterable[Variation], on_begin: Callable[[Variation], None]
) -> list[Outcome]:
    """Measure each variation in a new process; the order is retained."""
    outcomes: list[Outcome] = []
    for variation in variations:
        on_begin(variation)
        outcomes.append(_in_new_process(subject, variation))
    return outcomes


def _in_new_process(subject: Subject, variation: Variation) -> Outcome:
    # The child must die of Ctrl-C at once and without a traceback; the parent reports it.
    interruptible = (signal.SIGINT, signal.SIG_DFL)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=signal.signal, initargs=interruptible) as pool:
        try:
            return pool.submit(_attempt, subject, variation).result()
        except BrokenProcessPool:
            return Outcome(variation, problem=DIED)


def _attempt(subject: Subject, variation: Variation) -> Outcome:
    """Load and measure a variation in this process. Every failure is its outcome."""
    options = replace(
        subject.options,
        attention_backend=variation.attention_backend,
        compile=variation.compile,
        transformer_quantization=variation.quantization,
    )
    try:
        pipeline = ZImagePipeline.load(subject.model_path, options)
        _check_applied(variation, pipeline.describe())
        measurement, image = measure_generation(pipeline, subject.request, subject.runs)
    except ZImageError as error:
        return Outcome(variation, problem=error.message)
    except Exception as error:  # compilers and kernels raise anything
        return Outcome(variation, problem=f"{type(error).__name__}: {error}".splitlines()[0])
    return Outcome(variation, measurement, image)


def _check_applied(variation: Variation, described: dict[str, str]) -> None:
    """Raise `CheckpointError` if the loaded model is not the variation."""
    found = (described["attention_backend"], described["compiled"] != "no", described["transformer_quantization"])
    if found != (variation.attention_backend, variation.compile, variation.quantization):
        raise CheckpointError(f"was loaded with attention, compilation and quantization {found} instead")
