"""LoRAs of one generation: they change its images, are recorded with them, and leave nothing behind."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save

from tests.numerics import assert_levels_close
from tests.unit.imaging.test_lora import LORAS
from zcore.demo.check import style_of
from zcore.errors import GenerationCanceled, InvalidLora, InvalidRequest
from zcore.image_files.writing import read_parameters, write_image
from zcore.imaging.generation_inputs import Inputs
from zcore.imaging.lora.adapters import LoraWeights
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
    """A LoRA for images at night."""
    return pipeline.load_lora(NIGHT)


def asked(*loras: LoraUse) -> GenerationRequest:
    return GenerationRequest(prompt=PROMPT, width=128, height=128, seed=2, loras=loras)


def style(image: Image.Image) -> str:
    return style_of(np.asarray(image))


def generated(pipeline: ZImagePipeline, *loras: Any) -> Image.Image:
    return pipeline(PROMPT, width=128, height=128, seed=2, loras=loras)


def test_a_lora_changes_its_own_generation_and_no_other(pipeline: ZImagePipeline, night: LoraWeights) -> None:
    before = generated(pipeline)
    styled = pipeline.generate(asked(LoraUse(name="demo-night")), inputs=Inputs(loras={"demo-night": night}))
    assert (style(before), style(styled.images[0].image)) == ("plain", "night")
    assert style(generated(pipeline, pipeline.load_lora(OUTLINE))) == "outline"
    assert generated(pipeline).tobytes() == before.tobytes()


def test_the_scale_sets_the_strength(pipeline: ZImagePipeline, night: LoraWeights) -> None:
    plain, full = generated(pipeline), generated(pipeline, night)
    assert generated(pipeline, (night, 0.0)).tobytes() == plain.tobytes()
    assert generated(pipeline, (night, 1.0)).tobytes() == full.tobytes()
    assert generated(pipeline, (night, 0.5)).tobytes() not in (plain.tobytes(), full.tobytes())


def test_a_stopped_generation_leaves_nothing_of_its_lora(pipeline: ZImagePipeline, night: LoraWeights) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == 3:
            raise GenerationCanceled("canceled by the caller")

    before = generated(pipeline)
    with pytest.raises(GenerationCanceled):
        pipeline.generate(asked(LoraUse(name="demo-night")), stop, Inputs(loras={"demo-night": night}))
    assert generated(pipeline).tobytes() == before.tobytes()


def test_a_file_records_its_loras(pipeline: ZImagePipeline, night: LoraWeights) -> None:
    request = asked(LoraUse(name="demo-night", scale=0.5))
    result = pipeline.generate(request, inputs=Inputs(loras={"demo-night": night, "unused": night}))
    prompt = result.made_by["prompt_sha256"]
    assert result.made_by == {**pipeline.describe(), "prompt_sha256": prompt, "lora:demo-night": night.sha256}
    content = write_image(result.images[0].image, request, 0, result.made_by).content
    found = read_parameters(content)
    assert found is not None
    assert found.request.loras == request.loras
    assert found.made_by["lora:demo-night"] == night.sha256


def test_what_is_left_out_of_a_lora_is_stated_with_its_image(pipeline: ZImagePipeline) -> None:
    content = save({**load_file(NIGHT), "double_blocks.0.img_attn.qkv.alpha": torch.ones(1)})
    with pytest.raises(InvalidLora, match="has unsupported keys: double_blocks"):
        pipeline.load_lora(content, "partly")
    partly = pipeline.load_lora(content, "partly", strict=False)
    request = GenerationRequest(prompt=PROMPT, width=64, height=64, steps=1, loras=(LoraUse(name="partly"),))
    made_by = pipeline.generate(request, inputs=Inputs(loras={"partly": partly})).made_by
    assert made_by["lora_notice:partly"] == "left out (unsupported): double_blocks.0.img_attn.qkv.alpha"
    assert made_by["lora_strict:partly"] == "false"


def test_a_missing_lora_is_refused(pipeline: ZImagePipeline) -> None:
    with pytest.raises(InvalidRequest, match="loras: must be passed in the inputs: demo-night"):
        pipeline.generate(asked(LoraUse(name="demo-night")))


def test_a_lora_for_another_model_is_refused(tiny_pipeline: ZImagePipeline) -> None:
    with pytest.raises(InvalidLora, match=r"demo-night .*layers"):
        tiny_pipeline.load_lora(NIGHT)


def test_a_fused_lora_applies_to_every_image(pipeline: ZImagePipeline, night: LoraWeights, demo_folder: Path) -> None:
    fused = load(demo_folder, fused_loras=[(NIGHT, 0.8), (OUTLINE, 0.1)])
    unfused = generated(pipeline, (night, 0.8), (pipeline.load_lora(OUTLINE), 0.1))
    assert_levels_close(generated(fused), unfused)
    assert fused.describe()["lora_fused:demo-night"] == f"{night.sha256} at 0.8"
    assert "lora_fused:demo-night" not in pipeline.describe()
