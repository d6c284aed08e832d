"""LoRAs of one generation: they act on it, are said in what it was made by, and are gone with it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.imaging.test_lora import LORAS
from zcore.demo.check import style_of
from zcore.errors import GenerationCanceled, InvalidLora, InvalidRequest
from zcore.imaging.encode import encode_image, read_parameters
from zcore.imaging.inputs import Inputs
from zcore.imaging.model.lora import LoraWeights
from zcore.imaging.pipeline import Progress, ZImagePipeline
from zcore.request import GenerationRequest, LoraUse

NIGHT = LORAS / "demo-night.safetensors"
OUTLINE = LORAS / "demo-outline.safetensors"
PROMPT = "two blue stars"


def load(folder: Path, **options: Any) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(
        folder, torch_dtype=torch.float32, encoder_device="cpu", dit_device="cpu", vae_device="cpu", **options
    )


@pytest.fixture(scope="module")
def pipeline(demo_folder: Path) -> ZImagePipeline:
    """The demo checkpoint, with nothing fused."""
    return load(demo_folder)


@pytest.fixture(scope="module")
def night(pipeline: ZImagePipeline) -> LoraWeights:
    """Paints in the night's colours."""
    return pipeline.load_lora(NIGHT)


def asked(*loras: LoraUse) -> GenerationRequest:
    return GenerationRequest(prompt=PROMPT, width=128, height=128, seed=2, loras=loras)


def style(image: Image.Image) -> str:
    return style_of(np.asarray(image))


def painted(pipeline: ZImagePipeline, *loras: Any) -> Image.Image:
    return pipeline(PROMPT, width=128, height=128, seed=2, loras=loras)


def furthest(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


def test_it_changes_its_own_generation_and_no_other(pipeline: ZImagePipeline, night: LoraWeights) -> None:
    before = painted(pipeline)
    styled = pipeline.generate(asked(LoraUse(name="demo-night")), inputs=Inputs(loras={"demo-night": night}))
    assert (style(before), style(styled.images[0].image)) == ("plain", "night")
    assert style(painted(pipeline, pipeline.load_lora(OUTLINE))) == "outline"
    assert painted(pipeline).tobytes() == before.tobytes()


def test_a_scale_says_how_strongly(pipeline: ZImagePipeline, night: LoraWeights) -> None:
    plain, full = painted(pipeline), painted(pipeline, night)
    assert painted(pipeline, (night, 0.0)).tobytes() == plain.tobytes()
    assert painted(pipeline, (night, 1.0)).tobytes() == full.tobytes()
    assert painted(pipeline, (night, 0.5)).tobytes() not in (plain.tobytes(), full.tobytes())


def test_nothing_is_left_of_one_that_was_stopped(pipeline: ZImagePipeline, night: LoraWeights) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == 3:
            raise GenerationCanceled("the caller wants it no more")

    before = painted(pipeline)
    with pytest.raises(GenerationCanceled):
        pipeline.generate(asked(LoraUse(name="demo-night")), stop, Inputs(loras={"demo-night": night}))
    assert painted(pipeline).tobytes() == before.tobytes()


def test_a_file_says_which_loras_made_it(pipeline: ZImagePipeline, night: LoraWeights) -> None:
    request = asked(LoraUse(name="demo-night", scale=0.5))
    result = pipeline.generate(request, inputs=Inputs(loras={"demo-night": night, "unused": night}))
    assert result.made_by == {**pipeline.describe(), "lora:demo-night": night.sha256}
    content = encode_image(result.images[0].image, request, 0, result.made_by).content
    found = read_parameters(content)
    assert found is not None
    assert found.request.loras == request.loras
    assert found.made_by["lora:demo-night"] == night.sha256


def test_one_that_is_not_at_hand_is_refused(pipeline: ZImagePipeline) -> None:
    with pytest.raises(InvalidRequest, match="loras: there is no LoRA demo-night here"):
        pipeline.generate(asked(LoraUse(name="demo-night")))


def test_one_of_another_model_is_refused(tiny_pipeline: ZImagePipeline) -> None:
    with pytest.raises(InvalidLora, match=r"demo-night .*layers"):
        tiny_pipeline.load_lora(NIGHT)


def test_fused_by_configuration_it_acts_on_every_picture(
    pipeline: ZImagePipeline, night: LoraWeights, demo_folder: Path
) -> None:
    fused = load(demo_folder, fused_loras=[(NIGHT, 0.8), (OUTLINE, 0.1)])
    unfused = painted(pipeline, (night, 0.8), (pipeline.load_lora(OUTLINE), 0.1))
    assert furthest(painted(fused), unfused) <= 1
    assert fused.describe()["lora_fused:demo-night"] == f"{night.sha256} at 0.8"
    assert "lora_fused:demo-night" not in pipeline.describe()
