"""Pictures of one request at once, and what is given up, rung by rung, where memory does not suffice."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.imaging.memory_budget import MemoryBudget
from zcore.errors import GenerationCanceled, OutOfMemory
from zcore.imaging.inputs import Inputs
from zcore.imaging.pipeline import GenerationResult, Progress, ZImagePipeline
from zcore.imaging.relief import Ladder, Relief
from zcore.request import Dype, GenerationRequest, Pass, SkipLayerGuidance

CPU = torch.device("cpu")
TILES: dict[str, Any] = {"tile_size": 128, "tile_overlap": 16}
PICTURE = Image.fromarray(np.arange(64 * 96 * 3, dtype=np.uint8).reshape(96, 64, 3))
MASK = Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 48, 0).repeat(64, 1))
FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guided": {"guidance_scale": 3.0, "negative_prompt": "blur", "cfg_normalization": 1.0},
    "skipping layers": {"slg": SkipLayerGuidance(layers=(1, 3), start=0.0, stop=1.0)},
    "two passes, stretched": {
        "passes": (Pass(scale=0.5), Pass(scale=1.0, strength=0.5)),
        "dype": Dype(base_resolution=64),
    },
    "from a picture": {"image": "given:picture", "strength": 0.6},
    "inpainting": {"image": "given:picture", "mask": "given:mask", "strength": 0.8},
}


def loaded(folder: Path, **options: Any) -> ZImagePipeline:
    devices = {"encoder_device": "cpu", "dit_device": "cpu", "vae_device": "cpu"}
    return ZImagePipeline.from_pretrained(folder, torch_dtype="float32", **devices, **options)


def levels(result: GenerationResult) -> np.ndarray:
    """(n, H, W, 3), signed."""
    return np.stack([np.asarray(one.image) for one in result.images]).astype(int)


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_pictures_painted_at_once_are_those_painted_alone(tiny_folder: Path, fields: dict[str, Any]) -> None:
    request = GenerationRequest(prompt="a fox", width=64, height=96, steps=3, seed=5, n=3, **fields)
    inputs = Inputs(image=PICTURE if "image" in fields else None, mask=MASK if "mask" in fields else None)
    alone = loaded(tiny_folder).generate(request, inputs=inputs)
    at_once = loaded(tiny_folder, batch_size=2).generate(request, inputs=inputs)
    assert [one.seed for one in at_once.images] == [5, 6, 7]
    assert np.abs(levels(alone) - levels(at_once)).max() <= 1
    assert len({one.image.tobytes() for one in at_once.images}) == 3


def test_progress_counts_the_steps_of_all_pictures(tiny_folder: Path) -> None:
    told: list[Progress] = []
    loaded(tiny_folder, batch_size=2).generate(
        GenerationRequest(prompt="a fox", width=64, height=64, steps=3, n=3), told.append
    )
    assert [one.step for one in told if one.phase == "denoise"] == [0, 2, 4, 6, 7, 8]
    assert [one.step for one in told if one.phase == "decode"] == [6, 6, 9]
    assert {one.steps for one in told} == {9}


def test_several_pictures_can_be_stopped_between_two_steps(tiny_folder: Path) -> None:
    pipeline = loaded(tiny_folder, batch_size=2)
    request = GenerationRequest(prompt="a fox", width=64, height=64, steps=3, n=2, seed=1)
    before = levels(pipeline.generate(request))

    def stop(progress: Progress) -> None:
        if progress.step == 4:
            raise GenerationCanceled("enough")

    with pytest.raises(GenerationCanceled):
        pipeline.generate(request, stop)
    assert np.array_equal(levels(pipeline.generate(request)), before)


def within(
    budget_bytes: float, pipeline: ZImagePipeline, request: GenerationRequest
) -> tuple[GenerationResult, list[Relief]]:
    """A generation on a card with so much memory beside the weights, and the rungs it took."""
    rungs: list[Relief] = []
    with MemoryBudget(budget_bytes):
        result = pipeline.generate(request, on_relief=rungs.append)
    return result, rungs


# At 256 px the demo model takes 4.1 MB for a picture's forward, 8.1 for two, 15.5 for four; 21 MB to decode it in one
# piece, 7 MB in tiles of 128 px.
FOUR = GenerationRequest(prompt="a red star", width=256, height=256, steps=2, n=4, seed=1, tiled_vae=True)
ONE = GenerationRequest(prompt="a red star", width=256, height=256, steps=2, seed=1)


def test_a_batch_that_does_not_fit_is_split_until_it_does(demo_folder: Path) -> None:
    pipeline = loaded(demo_folder, batch_size=4, **TILES)
    roomy, none = within(math.inf, pipeline, FOUR)
    assert none == []
    halved, once = within(10e6, pipeline, FOUR)
    assert [(one.rung, one.sentence) for one in once] == [
        ("batch_split", "2 pictures are painted at once instead of 4")
    ]
    single, twice = within(7.5e6, pipeline, FOUR)
    assert [one.rung for one in twice] == ["batch_split", "batch_split"]
    assert np.array_equal(levels(halved), levels(loaded(demo_folder, batch_size=2, **TILES).generate(FOUR)))
    assert np.array_equal(levels(single), levels(loaded(demo_folder, **TILES).generate(FOUR)))
    assert np.abs(levels(roomy) - levels(single)).max() <= 1


def test_a_picture_that_cannot_be_decoded_whole_is_decoded_in_tiles_and_says_so(demo_folder: Path) -> None:
    pipeline = loaded(demo_folder, **TILES)
    told: list[Progress] = []
    rungs: list[Relief] = []
    with MemoryBudget(15e6):
        tiled = pipeline.generate(ONE, told.append, on_relief=rungs.append)
    assert [(one.rung, one.sentence) for one in rungs] == [
        ("vae_tiled", "the VAE works in tiles of 128 px, overlapping by 16 px")
    ]
    assert [one.step for one in told if one.phase == "denoise"] == [0, 1], "nothing was painted twice"
    assert tiled.made_by["vae_tiles"] == "128 px, overlapping by 16 px"
    asked_for = pipeline.generate(
        GenerationRequest(prompt="a red star", width=256, height=256, steps=2, seed=1, tiled_vae=True)
    )
    assert np.array_equal(levels(tiled), levels(asked_for))
    plain = pipeline.generate(ONE)
    assert "vae_tiles" not in plain.made_by, "a rung is one generation's"


def test_what_fits_in_no_way_fails_by_name_and_the_next_picture_is_painted(demo_folder: Path) -> None:
    pipeline = loaded(demo_folder, batch_size=2, **TILES)
    before = levels(pipeline.generate(ONE))
    rungs: list[Relief] = []
    request = GenerationRequest(prompt="a red star", width=256, height=256, steps=2, n=2, seed=1)
    with MemoryBudget(3e6), pytest.raises(OutOfMemory) as failure:
        pipeline.generate(request, on_relief=rungs.append)
    assert failure.value.code == "gpu_out_of_memory"
    assert failure.value.message.startswith(
        "256x256 does not fit the memory of cpu, though one picture is painted at once instead of 2: the budget is"
    )
    assert [one.rung for one in rungs] == ["batch_split"]
    assert np.array_equal(levels(pipeline.generate(ONE)), before)


class Encoder:
    """A text encoder on a card, as far as a ladder sees it: it can leave, once."""

    device = torch.device("cuda:0")

    def __init__(self) -> None:
        self.is_there = True

    def rest(self) -> bool:
        was_there, self.is_there = self.is_there, False
        return was_there


def test_the_text_encoder_leaves_last_and_only_the_device_that_is_full() -> None:
    rungs: list[str] = []
    encoder: Any = Encoder()
    ladder = Ladder("4x4", lambda relief: rungs.append(relief.rung), encoder=encoder, batch_size=2)

    def overflow(_at_once: int) -> None:
        raise torch.OutOfMemoryError("3 GiB")

    with pytest.raises(OutOfMemory, match="does not fit the memory of cpu"):
        ladder.paint(overflow, 2, CPU)
    assert rungs == ["batch_split"]
    assert encoder.is_there
    with pytest.raises(OutOfMemory, match=r"though .*; the text encoder has left cuda: 3 GiB"):
        ladder.paint(overflow, 2, torch.device("cuda"))
    assert rungs == ["batch_split", "encoder_rested"]


def test_what_is_given_up_for_a_lora_is_told(demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = loaded(demo_folder)
    encoder: Any = Encoder()
    monkeypatch.setattr(encoder, "device", CPU, raising=False)
    monkeypatch.setattr(pipeline, "_encoder", encoder)
    bind, tried = pipeline._model.lora, list[str]()

    def full_at_first(content: bytes, name: str) -> Any:
        tried.append(name)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("3 GiB")
        return bind(content, name)

    monkeypatch.setattr(pipeline._model, "lora", full_at_first)
    rungs: list[str] = []
    pipeline.load_lora(
        demo_folder.parent / "loras" / "demo-night.safetensors", on_relief=lambda relief: rungs.append(relief.rung)
    )
    assert (rungs, len(tried)) == (["encoder_rested"], 2)
