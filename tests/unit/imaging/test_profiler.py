"""What the profiler makes of the runs of a model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from zcore.imaging import profiler
from zcore.imaging.oom_fallback import FallbackStep
from zcore.imaging.pipeline import ZImagePipeline
from zcore.imaging.profiler import Measurement, PeakMemory, Spread, measure_encoding, measure_generation
from zcore.imaging.prompt_encoder import PromptEncoder
from zcore.imaging.result import GeneratedImage, GenerationMetrics, GenerationResult
from zcore.request import GenerationRequest, parse_generation

REQUEST = parse_generation({"prompt": "x", "width": 64, "height": 64, "steps": 2, "seed": 7})


class Scripted:
    """A pipeline whose runs take the given milliseconds and memory: encode, denoise, decode, MiB."""

    def __init__(self, runs: list[tuple[float, float, float, int]]) -> None:
        self._runs: Iterator[tuple[float, float, float, int]] = iter(runs)

    def generate(self, request: GenerationRequest, on_fallback: Any) -> GenerationResult:
        encode, denoise, decode, peak = next(self._runs)
        on_fallback(FallbackStep("vae_tiled", "the VAE works in tiles"))
        image = Image.new("L", (1, 1), round(denoise))
        metrics = GenerationMetrics(encode, denoise, decode, peak, prompt_tokens=1, used_tokens=1)
        return GenerationResult([GeneratedImage(image, request.seed, 0)], metrics, {}, [])

    def describe(self) -> dict[str, str]:
        return {"attention_backend": "sdpa", "compiled": "no", "model": "secret"}


def measured(runs: list[tuple[float, float, float, int]]) -> tuple[Measurement, Image.Image]:
    pipeline: Any = Scripted(runs)
    return measure_generation(pipeline, REQUEST, len(runs) - 1)


def test_the_first_run_counts_as_warm_up_only() -> None:
    measurement, image = measured([(900, 900, 900, 9), (1, 40, 5, 3), (3, 20, 4, 5), (2, 60, 6, 4)])
    assert measurement.runs == 3
    assert measurement.milliseconds == {
        "encode": Spread(2, 1, 3),
        "denoise": Spread(40, 20, 60),
        "decode": Spread(5, 4, 6),
        "generate": Spread(45, 24, 66),
        "total": Spread(46, 27, 68),
        "step": Spread(20, 10, 30),
    }
    assert image.getpixel((0, 0)) == 60
    assert measurement.applied == {"attention_backend": "sdpa", "compiled": "no"}


def test_the_peak_is_that_of_the_devices_over_all_runs() -> None:
    assert measured([(1, 1, 1, 9), (1, 1, 1, 3)])[0].peak_memory == PeakMemory(9 * 2**20, "cuda")


def test_without_cuda_the_peak_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "_process_peak_bytes", lambda: 123)
    assert measured([(1, 1, 1, 0), (1, 1, 1, 0)])[0].peak_memory == PeakMemory(123, "process")


def test_a_fallback_is_reported_once() -> None:
    assert measured([(1, 1, 1, 0), (1, 1, 1, 0)])[0].fallbacks == ("the VAE works in tiles",)


def test_a_real_pipeline_is_measured_without_changing_its_image(tiny_pipeline: ZImagePipeline) -> None:
    runs: list[int] = []
    measurement, image = measure_generation(tiny_pipeline, REQUEST, 2, runs.append)
    assert runs == [0, 1, 2]
    assert image.tobytes() == tiny_pipeline.generate(REQUEST).images[0].image.tobytes()
    assert all(0 < spread.minimum <= spread.median <= spread.maximum for spread in measurement.milliseconds.values())
    assert measurement.peak_memory.kind == "process"
    assert 2**26 < measurement.peak_memory.size_bytes < 2**36
    assert measurement.applied.keys() == set(profiler.APPLIED)


def test_a_text_encoder_is_measured_alone(tiny_folder: Path) -> None:
    encoder = PromptEncoder.from_pretrained(tiny_folder, device="cpu", torch_dtype="float32")
    measurement = measure_encoding(encoder, REQUEST, 2)
    assert measurement.milliseconds.keys() == {"encode"}
    assert measurement.milliseconds["encode"].minimum > 0
    assert measurement.applied == {
        "encoder_device": "cpu",
        "encoder_dtype": "float32",
        "encoder_quantization": "none",
    }
