"""How does DyPE change the demo model's images above the size that it was trained at?

Method: held-out captions of one object, a group and a pair, generated at twice and four times the base resolution with
the same seeds by each method, and judged by the checker, which reads every image at 128 px. If ZIMAGE_TEST_GRIDS names
a folder, a grid of the first eight images at each size is written there, one row per method. The base resolution is
that of the demo profile, so a checkpoint trained at another size is measured as it is shipped.
"""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.benchmarks.report import report
from zcore.demo import CHECKPOINT
from zcore.demo.captions import caption
from zcore.demo.check import judge
from zcore.demo.vocabulary import Kind, random_composition
from zcore.imaging.pipeline import ZImagePipeline
from zcore.request import Dype, GenerationRequest
from zcore.settings import load_settings

pytestmark = pytest.mark.benchmarks

KINDS: tuple[Kind, ...] = ("object", "count", "pair")
BASE = load_settings({"ZIMAGE_PROFILE": "demo"}).dype.base_resolution
WAYS: dict[str, Dype | None] = {
    "plain": None,
    "vision_yarn": Dype(base_resolution=BASE),
    "yarn": Dype(method="yarn", base_resolution=BASE),
    "ntk": Dype(method="ntk", base_resolution=BASE),
    "static yarn": Dype(method="yarn", dynamic=False, base_resolution=BASE),
    "static ntk": Dype(method="ntk", dynamic=False, base_resolution=BASE),
}


@pytest.fixture(scope="module")
def pipeline() -> ZImagePipeline:
    torch.set_num_threads(1)
    return ZImagePipeline.from_pretrained(CHECKPOINT, torch_dtype="float32", dit_device="cpu", encoder_device="cpu")


@pytest.mark.parametrize(("times", "tried"), [(2, 30), (4, 6)])
def test_above_the_trained_size(pipeline: ZImagePipeline, times: int, tried: int) -> None:
    side = times * BASE
    right: dict[str, float] = {}
    rows: list[np.ndarray] = []
    for way, dype in WAYS.items():
        rng = random.Random("dype")
        verdicts: list[bool] = []
        row: list[np.ndarray] = []
        for index in range(tried):
            wanted = random_composition(rng, KINDS[index % 3], held_out=True)
            request = GenerationRequest(
                prompt=caption(wanted, rng, True), width=side, height=side, seed=index, dype=dype
            )
            pixels = np.asarray(pipeline.generate(request).images[0].image)
            verdicts.append(judge(wanted, pixels).all_right)
            row.append(np.asarray(Image.fromarray(pixels).resize((128, 128))))
        right[way] = round(sum(verdicts) / tried, 3)
        rows.append(np.concatenate(row[:8], 1))
    report(f"all right at {side}x{side}, {tried} captions, base resolution {BASE}", **right)
    if folder := os.environ.get("ZIMAGE_TEST_GRIDS"):
        Image.fromarray(np.concatenate(rows)).save(Path(folder) / f"dype-{side}.png")
