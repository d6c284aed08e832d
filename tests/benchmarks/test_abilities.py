"""How well does the demo model follow input and prompt: img2img by strength, multi-pass against a single pass?

Method: captions of single objects whose colour-shape pairs training never showed, judged by the checker. For img2img
the input is a true render of one scene, and the prompt asks for another background, colour, shape and position.
Reported are the fraction of images with the input's position and background, and the fraction with the prompt's. For
multi-pass the same captions and seeds are generated in one pass and in two, at 256 px (160 captions each of one object,
a group and a pair) and at 512 px, twice the largest size that the demo model was trained at (40 each).
"""

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.benchmarks.report import report
from zcore.demo import CHECKPOINT
from zcore.demo.captions import caption
from zcore.demo.check import judge, read
from zcore.demo.render import Pixels, render
from zcore.demo.vocabulary import Composition, Kind, random_composition
from zcore.imaging.pipeline import Inputs, ZImagePipeline
from zcore.request import GenerationRequest, Pass

pytestmark = pytest.mark.benchmarks

TRIED = 80


@pytest.fixture(scope="module")
def pipeline() -> ZImagePipeline:
    torch.set_num_threads(1)
    return ZImagePipeline.from_pretrained(CHECKPOINT, torch_dtype="float32", dit_device="cpu", encoder_device="cpu")


def generate(pipeline: ZImagePipeline, text: str, inputs: Inputs | None = None, **fields: Any) -> Pixels:
    request = GenerationRequest(prompt=text, **{"width": 128, "height": 128, **fields})
    return np.asarray(pipeline.generate(request, inputs=inputs).images[0].image)


@pytest.mark.parametrize("strength", [0.3, 0.6, 0.9])
def test_strength(pipeline: ZImagePipeline, strength: float) -> None:
    rng = random.Random(5)
    counts = dict.fromkeys(
        (
            *("one object", "position of the input", "background of the input", "position of the prompt"),
            *("background of the prompt", "colour of the prompt", "shape of the prompt"),
        ),
        0,
    )
    for index in range(TRIED):
        before, wanted = _two_that_differ(rng)
        start = Image.fromarray(render(before, 128, 128, random.Random(index)))
        result = generate(
            pipeline, caption(wanted, rng, held_out=True), Inputs(image=start), image="given:render", strength=strength,
            seed=index,
        )  # fmt: skip
        reading = read(result)
        one = reading.objects[0] if len(reading.objects) == 1 else None
        counts["one object"] += one is not None
        counts["background of the input"] += reading.background == before.background
        counts["background of the prompt"] += reading.background == wanted.background
        if one is not None:
            counts["position of the input"] += one.position == before.layout
            counts["position of the prompt"] += one.position == wanted.layout
            counts["colour of the prompt"] += one.thing.colour == wanted.things[0].colour
            counts["shape of the prompt"] += one.thing.shape == wanted.things[0].shape
    report(
        f"img2img at strength {strength}: fraction that follows the input and the prompt, {TRIED} images",
        **{name: round(count / TRIED, 3) for name, count in counts.items()},
    )


@pytest.mark.parametrize(("side_px", "tried"), [(256, 2 * TRIED), (512, TRIED // 2)])
def test_multipass(pipeline: ZImagePipeline, side_px: int, tried: int) -> None:
    kinds: tuple[Kind, ...] = ("object", "count", "pair")
    ways: dict[str, dict[str, Any]] = {
        "one pass": {},
        "two passes": {"passes": (Pass(scale=0.5), Pass(scale=1.0, strength=0.5))},
    }
    right: dict[str, float] = {}
    for way, fields in ways.items():
        for kind in kinds:
            rng = random.Random(f"multipass {kind}")
            verdicts = [
                judge(
                    wanted,
                    generate(pipeline, caption(wanted, rng, True), width=side_px, height=side_px, seed=index, **fields),
                )
                for index, wanted in enumerate(random_composition(rng, kind, held_out=True) for _ in range(tried))
            ]
            right[f"{way}, {kind}"] = round(sum(verdict.all_right for verdict in verdicts) / len(verdicts), 3)
    report(f"all right at {side_px}x{side_px} in one pass and in two, {tried} captions a kind", **right)


def _two_that_differ(rng: random.Random) -> tuple[Composition, Composition]:
    while True:
        one, other = (random_composition(rng, "object", held_out) for held_out in (False, True))
        thing, wanted = one.things[0], other.things[0]
        if (
            one.layout != other.layout
            and one.background != other.background
            and thing.colour != wanted.colour
            and thing.shape != wanted.shape
        ):
            return one, other
