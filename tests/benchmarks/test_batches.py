"""Do several images in one forward take less time than one after the other?

Method: the demo checkpoint in float32 on one thread; a request of eight images at 128 px, generated 1, 4 and 8 at once,
alternately, ten times. Reported are milliseconds per image, and ratios to one at once of the same round, as medians.
"""

import time
from statistics import median

import pytest
import torch

from tests.benchmarks.report import report, spread
from zcore.demo import CHECKPOINT
from zcore.imaging.pipeline import ZImagePipeline
from zcore.request import GenerationRequest

pytestmark = pytest.mark.benchmarks

SIZES = (1, 4, 8)
IMAGES = 8


def test_images_at_once() -> None:
    torch.set_num_threads(1)
    pipelines = {
        size: ZImagePipeline.from_pretrained(
            CHECKPOINT, torch_dtype="float32", dit_device="cpu", encoder_device="cpu", vae_device="cpu", batch_size=size
        )
        for size in SIZES
    }
    request = GenerationRequest(prompt="a red star", width=128, height=128, n=IMAGES, seed=1)
    taken: dict[int, list[float]] = {size: [] for size in SIZES}
    for round_ in range(11):
        for size, pipeline in pipelines.items():
            began = time.perf_counter()
            pipeline.generate(request)
            if round_:  # the first warms up
                taken[size].append((time.perf_counter() - began) * 1000 / IMAGES)
    ratios = {size: median(b / a for a, b in zip(taken[1], taken[size], strict=True)) for size in SIZES[1:]}
    report(
        "ms per image of 128 px, generated 1, 4 and 8 at once",
        **{f"at_once_{size}": spread(several) for size, several in taken.items()},
        **{f"ratio_{size}": round(ratio, 3) for size, ratio in ratios.items()},
    )
