"""What does skip layer guidance cost per step, and how does it change the demo model's images?

Method: float32 on one thread. Cost: one image of 128x128; a forward, a forward with the prediction without skipped
layers, and two forwards, in turn, 40 times each after a warm-up. The arithmetic ratio (blocks that run, divided by
blocks of two forwards) is reported with it. Images: held-out captions at 128x128, judged by the checker; if
ZIMAGE_TEST_GRIDS names a folder, a grid of plain and guided images of the same seeds is written there.
"""

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from PIL import Image

from tests.benchmarks.report import report
from zcore.checkpoint.geometry import LatentSize
from zcore.demo import CHECKPOINT
from zcore.demo.captions import caption
from zcore.demo.check import judge
from zcore.demo.vocabulary import Kind, random_composition
from zcore.imaging.network.velocity_model import VelocityModel
from zcore.imaging.pipeline import ZImagePipeline
from zcore.imaging.sampling.schedule import sigmas
from zcore.imaging.weights.loader import Placement, load_transformer
from zcore.request import GenerationRequest, SkipLayerGuidance

pytestmark = pytest.mark.benchmarks

CPU = torch.device("cpu")
TRIED = 40
WAYS: dict[str, SkipLayerGuidance | None] = {
    "plain": None,
    **{
        f"layer {layer}, scale {scale}": SkipLayerGuidance(scale=scale, layers=(layer,))
        for layer, scale in ((1, 1.0), (2, 1.0), (3, 1.0), (2, 2.5))
    },
}


@pytest.mark.parametrize("skipped", [(2,), (1, 2)])
def test_cost_of_a_step(skipped: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    transformer = load_transformer(Path(CHECKPOINT), Placement(CPU, torch.float32))
    model = VelocityModel(transformer, CPU, torch.float32)
    plan = model.plan(torch.randn(20, model.prompt_width), LatentSize(16, 16), sigmas(8, 3.0))
    latents = torch.randn(16, 16, 16)
    ways: dict[str, Callable[[], object]] = {
        "one forward": lambda: model.velocity(plan, latents, 2),
        "with skipped": lambda: model.velocities_skipping([plan], [latents], [2], skipped),
        "two forwards": lambda: [model.velocity(plan, latents, 2) for _ in range(2)],
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for round_ in range(42):
            for name, run in ways.items():
                began = time.perf_counter()
                run()
                if round_ > 1:
                    taken[name].append(1000 * (time.perf_counter() - began))
    middle = {name: median(samples) for name, samples in taken.items()}
    count = model.layer_count
    report(
        f"ms a step, layers {skipped} of {count} skipped",
        **{name: round(value, 2) for name, value in middle.items()},
        by_two_forwards=round(middle["with skipped"] / middle["two forwards"], 3),
        by_two_forwards_in_blocks=round((2 * count - min(skipped) - len(skipped)) / (2 * count), 3),
    )


def test_images() -> None:
    torch.set_num_threads(1)
    pipeline = ZImagePipeline.from_pretrained(CHECKPOINT, torch_dtype="float32", dit_device="cpu", encoder_device="cpu")
    kinds: tuple[Kind, ...] = ("object", "count", "pair")
    right: dict[str, float] = {}
    rows: list[np.ndarray] = []
    for way, slg in WAYS.items():
        rng = random.Random("skip layers")
        verdicts: list[bool] = []
        row: list[np.ndarray] = []
        for index in range(TRIED):
            wanted = random_composition(rng, kinds[index % 3], held_out=True)
            request = GenerationRequest(prompt=caption(wanted, rng, True), width=128, height=128, seed=index, slg=slg)
            pixels = np.asarray(pipeline.generate(request).images[0].image)
            verdicts.append(judge(wanted, pixels).all_right)
            row.append(pixels)
        right[way] = round(sum(verdicts) / TRIED, 3)
        rows.append(np.concatenate(row[:9], 1))
    report(f"all right with skip layer guidance at 128x128, {TRIED} captions", **right)
    if folder := os.environ.get("ZIMAGE_TEST_GRIDS"):
        Image.fromarray(np.concatenate(rows)).save(Path(folder) / "skip-layers.png")
