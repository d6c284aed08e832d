"""Our loop computes what diffusers' own pipeline computes, on the same weights, in float32."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from zcore.imaging.model.vae import PictureDecoder
from zcore.imaging.pipeline import ZImagePipeline
from zcore.request import GenerationRequest

PROMPT = "a red circle on a white background, painted large enough that its caption needs some padding"


@pytest.fixture(scope="module", params=["tiny_folder", "demo_folder"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    """Each test runs on random weights and on the demo checkpoint."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> diffusers.ZImagePipeline:
    """diffusers' pipeline in float32."""
    pipeline = diffusers.ZImagePipeline.from_pretrained(checkpoint, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def ours(checkpoint: Path) -> ZImagePipeline:
    """Our pipeline in float32."""
    return ZImagePipeline.from_pretrained(checkpoint, torch_dtype="float32", dit_device="cpu")


@pytest.mark.parametrize(("width", "height"), [(64, 64), (128, 192), (256, 256)])
def test_latents_are_those_of_diffusers(
    reference: diffusers.ZImagePipeline,
    ours: ZImagePipeline,
    monkeypatch: pytest.MonkeyPatch,
    width: int,
    height: int,
) -> None:
    noise = torch.randn((1, 16, height // 8, width // 8), generator=torch.Generator().manual_seed(42))
    expected = _by_diffusers(reference, width, height, latents=noise, output_type="latent")

    latents = _our_latents(ours, _request(width, height), monkeypatch)

    assert expected.std() > 0.1
    assert not torch.allclose(expected, noise, atol=0.1)
    assert (latents - expected[0]).abs().max() <= 1e-5


def test_a_seed_means_the_same_picture_as_in_diffusers(
    reference: diffusers.ZImagePipeline, ours: ZImagePipeline
) -> None:
    (expected,) = _by_diffusers(reference, 128, 192, generator=torch.Generator().manual_seed(42), output_type="pil")

    picture = ours.generate(_request(128, 192)).images[0].image

    assert picture.size == expected.size == (128, 192)
    assert np.abs(_levels(picture) - _levels(expected)).max() <= 1


def test_the_prompt_decides_the_latents(ours: ZImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    one = _our_latents(ours, _request(64, 64), monkeypatch)
    other = _our_latents(ours, _request(64, 64, prompt="a blue square"), monkeypatch)
    assert (one - other).abs().max() > 1e-3


def _request(width: int, height: int, prompt: str = PROMPT) -> GenerationRequest:
    return GenerationRequest(prompt=prompt, width=width, height=height, seed=42)


def _by_diffusers(pipeline: diffusers.ZImagePipeline, width: int, height: int, **how: object) -> torch.Tensor:
    return pipeline(prompt=PROMPT, width=width, height=height, num_inference_steps=8, guidance_scale=0.0, **how).images


def _our_latents(pipeline: ZImagePipeline, request: GenerationRequest, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """What reaches the decoder."""
    seen: list[torch.Tensor] = []
    decode = PictureDecoder.decode

    def recording(decoder: PictureDecoder, latents: torch.Tensor) -> Image.Image:
        seen.append(latents.clone())
        return decode(decoder, latents)

    with monkeypatch.context() as patched:
        patched.setattr(PictureDecoder, "decode", recording)
        pipeline.generate(request)
    (latents,) = seen
    return latents


def _levels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, dtype=np.int16)
