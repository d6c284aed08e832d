"""NaN and infinity: wherever they arise, the generation fails with an error instead of returning a black image."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from zcore.errors import NonFiniteValues
from zcore.imaging import sampler
from zcore.imaging.generation_inputs import Inputs
from zcore.imaging.oom_fallback import FallbackStep
from zcore.imaging.pipeline import ZImagePipeline
from zcore.imaging.prompt_encoder import PromptEncoder
from zcore.imaging.weights import loader
from zcore.imaging.weights.loader import Placement
from zcore.request import GenerationRequest, LoraUse, Pass

CPU = torch.device("cpu")
REQUEST = GenerationRequest(prompt="a fox", width=64, height=64, steps=3, seed=5)
FROM_IMAGE = replace(REQUEST, image="given:image", strength=0.6)
IMAGE = Image.new("RGB", (64, 64), "white")


def loaded(folder: Path, **options: object) -> ZImagePipeline:
    devices = {"encoder_device": "cpu", "dit_device": "cpu", "vae_device": "cpu"}
    return ZImagePipeline.from_pretrained(folder, torch_dtype="float32", **devices, **options)


def changed_checkpoint(folder: Path, target: Path, component: str, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Copy a checkpoint and rewrite the weights of one network."""
    shutil.copytree(folder, target)
    (file,) = (target / component).glob("*.safetensors")
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return target


def huge_lora(path: Path, dim: int = 96) -> Path:
    """Write a LoRA of finite values whose product is infinite."""
    name = "diffusion_model.layers.0.attention.to_q"
    factors = {f"{name}.lora_A.weight": (4, dim), f"{name}.lora_B.weight": (dim, 4)}
    save_file({key: torch.full(shape, 1e30) for key, shape in factors.items()}, path)
    return path


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_lora_of_huge_values_fails_its_generation_at_the_first_step_and_no_other(
    tiny_folder: Path, tmp_path: Path, batch_size: int
) -> None:
    pipeline = loaded(tiny_folder, batch_size=batch_size)
    before = pipeline.generate(REQUEST).images[0].image
    lora = pipeline.load_lora(huge_lora(tmp_path / "huge.safetensors"))
    asked = replace(REQUEST, loras=(LoraUse(name="huge"),), n=2)
    with pytest.raises(NonFiniteValues) as failure:
        pipeline.generate(asked, inputs=Inputs(loras={"huge": lora}))
    assert (failure.value.code, failure.value.retryable) == ("non_finite_values", False)
    assert failure.value.message.startswith(
        "the latents are NaN or infinite after step 1 of 3; usual causes are a LoRA"
    )
    assert pipeline.generate(REQUEST).images[0].image.tobytes() == before.tobytes()


def test_the_first_bad_step_is_counted_over_all_passes(
    tiny_pipeline: ZImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def step(latents: Tensor, velocity: Tensor, sigma: float, next_sigma: float) -> Tensor:
        nonlocal calls
        calls += 1
        return latents + (next_sigma - sigma) * (velocity if calls < 4 else velocity * torch.inf)

    monkeypatch.setattr(sampler, "euler_step", step)
    passes = (Pass(scale=0.5, steps=2), Pass(scale=1.0, strength=1.0, steps=4))
    with pytest.raises(NonFiniteValues, match="the latents are NaN or infinite after step 4 of 6;"):
        tiny_pipeline.generate(replace(REQUEST, passes=passes))


@pytest.mark.parametrize(
    ("component", "weight", "request_of", "subject"),
    [
        ("text_encoder", "layers.1.mlp.up_proj.weight", REQUEST, "the values of the prompt's embedding"),
        ("transformer", "layers.3.attention.to_v.weight", REQUEST, "the latents are NaN or infinite after step 1 of 3"),
        ("vae", "encoder.conv_in.weight", FROM_IMAGE, "the latents of the input image"),
        ("vae", "decoder.conv_out.bias", REQUEST, "the decoded pixels"),
    ],
)
def test_damaged_weights_are_reported_where_they_act(
    tiny_folder: Path, tmp_path: Path, component: str, weight: str, request_of: GenerationRequest, subject: str
) -> None:
    def damage(weights: dict[str, Tensor]) -> None:
        weights[weight].view(-1)[0] = torch.nan  # in the last case, one color channel of three

    pipeline = loaded(changed_checkpoint(tiny_folder, tmp_path / "damaged", component, damage))
    with pytest.raises(NonFiniteValues, match=subject):
        pipeline.generate(request_of, inputs=Inputs(image=IMAGE if request_of.image else None))


def test_pixels_decoded_in_tiles_are_checked_as_well(tiny_folder: Path, tmp_path: Path) -> None:
    def damage(weights: dict[str, Tensor]) -> None:
        weights["decoder.conv_out.bias"][2] = torch.inf

    folder = changed_checkpoint(tiny_folder, tmp_path / "damaged", "vae", damage)
    pipeline = loaded(folder, tile_size=128, tile_overlap=16)
    with pytest.raises(NonFiniteValues, match="the decoded pixels"):
        pipeline.generate(replace(REQUEST, width=160, tiled_vae=True))


def test_an_embedding_of_infinite_values_is_refused_when_it_is_made_and_when_it_is_used(
    tiny_folder: Path, tiny_pipeline: ZImagePipeline, tmp_path: Path
) -> None:
    def damage(weights: dict[str, Tensor]) -> None:
        weights["layers.0.mlp.up_proj.weight"].fill_(torch.inf)

    damaged = PromptEncoder.from_pretrained(
        changed_checkpoint(tiny_folder, tmp_path / "damaged", "text_encoder", damage), device="cpu"
    )
    for encode in (damaged.encode, lambda prompt: damaged.encode_batch(["a cat", prompt])):
        with pytest.raises(NonFiniteValues, match="the values of the prompt's embedding"):
            encode("a fox")
    embedding = PromptEncoder.from_pretrained(tiny_folder, device="cpu").encode("a fox")
    embeds = embedding.embeds.clone()
    embeds[-1, 0] = torch.inf
    with pytest.raises(NonFiniteValues, match="the values of the prompt's embedding"):
        tiny_pipeline.generate_from_embeddings(
            dataclasses.replace(embedding, embeds=embeds), width=64, height=64, steps=2
        )


@pytest.mark.parametrize(
    ("weight", "request_of"), [("decoder.conv_in.weight", REQUEST), ("encoder.conv_in.weight", FROM_IMAGE)]
)
def test_a_vae_that_overflows_only_in_float16_works_in_float32_and_says_so(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: str, request_of: GenerationRequest
) -> None:
    def scale_up(weights: dict[str, Tensor]) -> None:
        weights[weight] *= 3e5
        for name, values in weights.items():
            weights[name] = values.half().float()  # exact in both dtypes, so that the results are comparable

    folder = changed_checkpoint(tiny_folder, tmp_path / "overflowing", "vae", scale_up)
    wide = loaded(folder)
    monkeypatch.setattr(loader, "vae_placement", lambda *_: Placement(CPU, torch.float16))
    narrow = loaded(folder)
    inputs = Inputs(image=IMAGE if request_of.image else None)
    expected = wide.generate(request_of, inputs=inputs)
    for _ in range(2):
        taken: list[FallbackStep] = []
        result = narrow.generate(replace(request_of, n=2), inputs=inputs, on_fallback=taken.append)
        assert np.array_equal(np.asarray(result.images[0].image), np.asarray(expected.images[0].image))
        assert [(one.event, one.kind) for one in taken] == [("precision_fallback", "vae_float32")], (
            "once for all images"
        )
        assert taken[0].description == "the VAE works in float32, because its values in float16 were NaN or infinite"
        assert result.made_by["vae_fallback"] == taken[0].description
        assert result.made_by["vae_dtype"] == "float16"
    assert "vae_fallback" not in expected.made_by


def test_values_that_are_not_finite_in_float32_either_are_an_error(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(weights: dict[str, Tensor]) -> None:
        weights["decoder.conv_out.bias"][0] = torch.nan

    monkeypatch.setattr(loader, "vae_placement", lambda *_: Placement(CPU, torch.float16))
    pipeline = loaded(changed_checkpoint(tiny_folder, tmp_path / "damaged", "vae", damage))
    with pytest.raises(NonFiniteValues, match="the decoded pixels"):
        pipeline.generate(REQUEST)
