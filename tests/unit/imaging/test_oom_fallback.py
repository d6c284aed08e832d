"""Several images per forward, and the fallback steps that are taken when memory runs out."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.numerics import assert_levels_close
from tests.unit.imaging.memory_budget import MemoryBudget
from zcore.errors import GenerationCanceled, OutOfMemory
from zcore.imaging.generation_inputs import Inputs
from zcore.imaging.oom_fallback import FallbackStep, OomFallback
from zcore.imaging.pipeline import GenerationResult, Progress, ZImagePipeline
from zcore.request import Dype, GenerationRequest, Pass, SkipLayerGuidance

CPU = torch.device("cpu")
TILES: dict[str, Any] = {"tile_size": 128, "tile_overlap": 16}
IMAGE = Image.fromarray(np.arange(64 * 96 * 3, dtype=np.uint8).reshape(96, 64, 3))
MASK = Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 48, 0).repeat(64, 1))
FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guided": {"guidance_scale": 3.0, "negative_prompt": "blur", "cfg_normalization": 1.0},
    "skipping layers": {"slg": SkipLayerGuidance(layers=(1, 3), start=0.0, stop=1.0)},
    "two passes, stretched": {
        "passes": (Pass(scale=0.5), Pass(scale=1.0, strength=0.5)),
        "dype": Dype(base_resolution=64),
    },
    "from an image": {"image": "given:image", "strength": 0.6},
    "inpainting": {"image": "given:image", "mask": "given:mask", "strength": 0.8},
}


def loaded(folder: Path, **options: Any) -> ZImagePipeline:
    devices = {"encoder_device": "cpu", "dit_device": "cpu", "vae_device": "cpu"}
    return ZImagePipeline.from_pretrained(folder, torch_dtype="float32", **devices, **options)


def levels(result: GenerationResult) -> np.ndarray:
    """(n, H, W, 3), signed."""
    return np.stack([np.asarray(one.image) for one in result.images]).astype(int)


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_images_generated_together_equal_those_generated_alone(tiny_folder: Path, fields: dict[str, Any]) -> None:
    request = GenerationRequest(prompt="a fox", width=64, height=96, steps=3, seed=5, n=3, **fields)
    inputs = Inputs(image=IMAGE if "image" in fields else None, mask=MASK if "mask" in fields else None)
    alone = loaded(tiny_folder).generate(request, inputs=inputs)
    at_once = loaded(tiny_folder, batch_size=2).generate(request, inputs=inputs)
    assert [one.seed for one in at_once.images] == [5, 6, 7]
    assert_levels_close(levels(alone), levels(at_once))
    assert len({one.image.tobytes() for one in at_once.images}) == 3


def test_progress_counts_the_steps_of_all_images(tiny_folder: Path) -> None:
    reported: list[Progress] = []
    loaded(tiny_folder, batch_size=2).generate(
        GenerationRequest(prompt="a fox", width=64, height=64, steps=3, n=3), reported.append
    )
    assert [one.step for one in reported if one.phase == "denoise"] == [0, 2, 4, 6, 7, 8]
    assert [one.step for one in reported if one.phase == "decode"] == [6, 6, 9]
    assert {one.steps for one in reported} == {9}


def test_several_images_can_be_stopped_between_two_steps(tiny_folder: Path) -> None:
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
) -> tuple[GenerationResult, list[FallbackStep]]:
    """Generate on a device with this much memory besides the weights; return the fallback steps taken as well."""
    steps: list[FallbackStep] = []
    with MemoryBudget(budget_bytes):
        result = pipeline.generate(request, on_fallback=steps.append)
    return result, steps


# At 256 px the forward of the demo model takes 4.1 MB for one image, 8.1 for two, 15.5 for four; decoding takes 21 MB
# in one piece, 7 MB in tiles of 128 px.
FOUR = GenerationRequest(prompt="a red star", width=256, height=256, steps=2, n=4, seed=1, tiled_vae=True)
ONE = GenerationRequest(prompt="a red star", width=256, height=256, steps=2, seed=1)


def test_a_batch_that_does_not_fit_is_split_until_it_does(demo_folder: Path) -> None:
    pipeline = loaded(demo_folder, batch_size=4, **TILES)
    unlimited, none = within(math.inf, pipeline, FOUR)
    assert none == []
    halved, once = within(10e6, pipeline, FOUR)
    assert [(one.kind, one.description) for one in once] == [("batch_split", "2 images per forward instead of 4")]
    single, twice = within(7.5e6, pipeline, FOUR)
    assert [one.kind for one in twice] == ["batch_split", "batch_split"]
    assert np.array_equal(levels(halved), levels(loaded(demo_folder, batch_size=2, **TILES).generate(FOUR)))
    assert np.array_equal(levels(single), levels(loaded(demo_folder, **TILES).generate(FOUR)))
    assert_levels_close(levels(unlimited), levels(single))


def test_an_image_too_large_to_decode_whole_is_decoded_in_tiles_and_reported(demo_folder: Path) -> None:
    pipeline = loaded(demo_folder, **TILES)
    reported: list[Progress] = []
    steps: list[FallbackStep] = []
    with MemoryBudget(15e6):
        tiled = pipeline.generate(ONE, reported.append, on_fallback=steps.append)
    assert [(one.kind, one.description) for one in steps] == [
        ("vae_tiled", "the VAE works in tiles of 128 px, overlapping by 16 px")
    ]
    assert [one.step for one in reported if one.phase == "denoise"] == [0, 1], "nothing was generated twice"
    assert tiled.made_by["vae_tiles"] == "128 px, overlapping by 16 px"
    asked_for = pipeline.generate(
        GenerationRequest(prompt="a red star", width=256, height=256, steps=2, seed=1, tiled_vae=True)
    )
    assert np.array_equal(levels(tiled), levels(asked_for))
    plain = pipeline.generate(ONE)
    assert "vae_tiles" not in plain.made_by, "a fallback step applies to one generation"


def test_a_request_that_never_fits_fails_by_name_and_the_next_one_runs(demo_folder: Path) -> None:
    pipeline = loaded(demo_folder, batch_size=2, **TILES)
    before = levels(pipeline.generate(ONE))
    steps: list[FallbackStep] = []
    request = GenerationRequest(prompt="a red star", width=256, height=256, steps=2, n=2, seed=1)
    with MemoryBudget(3e6), pytest.raises(OutOfMemory) as failure:
        pipeline.generate(request, on_fallback=steps.append)
    assert failure.value.code == "gpu_out_of_memory"
    assert failure.value.message.startswith(
        "256x256 does not fit in the memory of cpu after fallback (1 image per forward instead of 2): the budget is"
    )
    assert [one.kind for one in steps] == ["batch_split"]
    assert np.array_equal(levels(pipeline.generate(ONE)), before)


class StandInEncoder:
    """Stands in for a text encoder on a GPU: it can be unloaded once."""

    device = torch.device("cuda:0")

    def __init__(self) -> None:
        self.is_loaded = True

    def unload(self) -> bool:
        was_loaded, self.is_loaded = self.is_loaded, False
        return was_loaded


def test_the_text_encoder_is_unloaded_last_and_only_from_the_full_device() -> None:
    steps: list[str] = []
    encoder: Any = StandInEncoder()
    fallback = OomFallback("4x4", lambda step: steps.append(step.kind), encoder=encoder, batch_size=2)

    def overflow(_at_once: int) -> None:
        raise torch.OutOfMemoryError("3 GiB")

    with pytest.raises(OutOfMemory, match="does not fit in the memory of cpu"):
        fallback.generate(overflow, 2, CPU)
    assert steps == ["batch_split"]
    assert encoder.is_loaded
    with pytest.raises(OutOfMemory, match=r"after fallback \(.*; the text encoder was unloaded from cuda\): 3 GiB"):
        fallback.generate(overflow, 2, torch.device("cuda"))
    assert steps == ["batch_split", "encoder_unloaded"]


def test_a_fallback_step_for_a_lora_is_reported(demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = loaded(demo_folder)
    encoder: Any = StandInEncoder()
    monkeypatch.setattr(encoder, "device", CPU, raising=False)
    monkeypatch.setattr(pipeline._engine, "_encoder", encoder)
    bind, tried = pipeline._engine._model.lora, list[str]()

    def full_at_first(content: bytes, name: str, **options: Any) -> Any:
        tried.append(name)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("3 GiB")
        return bind(content, name, **options)

    monkeypatch.setattr(pipeline._engine._model, "lora", full_at_first)
    steps: list[str] = []
    pipeline.load_lora(
        demo_folder.parent / "loras" / "demo-night.safetensors", on_fallback=lambda step: steps.append(step.kind)
    )
    assert (steps, len(tried)) == (["encoder_unloaded"], 2)
