"""Our loop computes what diffusers' own pipelines compute, on the same weights and embeddings, in float32; and our
embeddings are theirs.

Both are compared by themselves: the embeddings differ in their last bits, because diffusers pads every prompt to 512
tokens and we pad none, and a trained network turns that into more than the loop's own rounding.
"""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from zcore.imaging.model.vae import PictureCoder
from zcore.imaging.pipeline import Inputs, ZImagePipeline
from zcore.imaging.prompt_encoder import PromptEncoder
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


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> PromptEncoder:
    """Our text encoder in float32."""
    return PromptEncoder.from_pretrained(checkpoint, device="cpu", torch_dtype="float32")


def test_embeddings_are_those_of_diffusers(reference: diffusers.ZImagePipeline, encoder: PromptEncoder) -> None:
    for prompt in (PROMPT, "a", ""):
        (expected,), _ = reference.encode_prompt([prompt], do_classifier_free_guidance=False)
        embeds = encoder.encode(GenerationRequest(prompt=prompt)).embeds
        assert embeds.shape == expected.shape
        assert (embeds - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("width", "height"), [(64, 64), (128, 192), (256, 256)])
def test_latents_are_those_of_diffusers(
    reference: diffusers.ZImagePipeline,
    ours: ZImagePipeline,
    encoder: PromptEncoder,
    monkeypatch: pytest.MonkeyPatch,
    width: int,
    height: int,
) -> None:
    noise = torch.randn((1, 16, height // 8, width // 8), generator=torch.Generator().manual_seed(42))
    expected = _by_diffusers(
        reference, _embedded(encoder), width=width, height=height, latents=noise, output_type="latent"
    )

    latents = _our_latents(ours, _request(width, height), monkeypatch)

    assert expected.std() > 0.1
    assert not torch.allclose(expected, noise, atol=0.1)
    assert (latents - expected[0]).abs().max() <= 1e-5


def test_a_seed_means_the_same_picture_as_in_diffusers(
    reference: diffusers.ZImagePipeline, ours: ZImagePipeline
) -> None:
    (expected,) = _by_diffusers(
        reference,
        {"prompt": PROMPT},
        width=128,
        height=192,
        generator=torch.Generator().manual_seed(42),
        output_type="pil",
    )

    picture = ours.generate(_request(128, 192)).images[0].image

    assert picture.size == expected.size == (128, 192)
    assert np.abs(_levels(picture) - _levels(expected)).max() <= 1


@pytest.mark.parametrize(
    "guidance",
    [
        {"guidance_scale": 3.0},
        {"guidance_scale": 3.0, "negative_prompt": "a blue square"},
        {"guidance_scale": 5.0, "cfg_normalization": 0.8},
        {"guidance_scale": 3.0, "cfg_truncation": 0.4},
    ],
    ids=["scale", "negative", "normalization", "truncation"],
)
def test_guided_latents_are_those_of_diffusers(
    reference: diffusers.ZImagePipeline,
    ours: ZImagePipeline,
    encoder: PromptEncoder,
    monkeypatch: pytest.MonkeyPatch,
    guidance: dict[str, Any],
) -> None:
    how = {name: value for name, value in guidance.items() if name != "negative_prompt"}
    expected = _by_diffusers(
        reference,
        _embedded(encoder, **guidance),
        width=64,
        height=96,
        generator=torch.Generator().manual_seed(42),
        output_type="latent",
        **how,
    )
    unguided = _our_latents(ours, _request(64, 96), monkeypatch)

    latents = _our_latents(ours, _request(64, 96, **guidance), monkeypatch)

    assert (latents - unguided).abs().max() > 1e-2
    # Prompts of two lengths are one masked batch there, and guidance multiplies what its kernel rounds otherwise.
    assert (latents - expected[0]).abs().max() <= (1e-4 if "negative_prompt" in guidance else 1e-5)


@pytest.mark.parametrize("strength", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("masked", [False, True], ids=["img2img", "inpainting"])
def test_latents_from_a_picture_are_those_of_diffusers_under_its_strength_rule(
    reference: diffusers.ZImagePipeline,
    ours: ZImagePipeline,
    encoder: PromptEncoder,
    monkeypatch: pytest.MonkeyPatch,
    strength: float,
    masked: bool,
) -> None:
    image, mask = _photo(128, 96), _half_mask(128, 96)
    pipeline = (diffusers.ZImageInpaintPipeline if masked else diffusers.ZImageImg2ImgPipeline)(**reference.components)
    pipeline.set_progress_bar_config(disable=True)
    (expected,) = _by_diffusers(
        pipeline,
        _embedded(encoder),
        image=image,
        **({"mask_image": mask} if masked else {}),
        strength=strength,
        generator=torch.Generator().manual_seed(42),
        output_type="latent",
    )
    inputs = {"image": image, "mask": mask} if masked else {"image": image}

    request = _request(
        128, 96, strength=strength, strength_rule="diffusers", **{name: f"given:{name}" for name in inputs}
    )
    latents = _our_latents(ours, request, monkeypatch, Inputs(**inputs))

    assert expected.std() > 0.1
    assert (latents - expected).abs().max() <= 1e-5


def test_the_prompt_decides_the_latents(ours: ZImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    one = _our_latents(ours, _request(64, 64), monkeypatch)
    other = _our_latents(ours, _request(64, 64, prompt="a blue square"), monkeypatch)
    assert (one - other).abs().max() > 1e-3


def _request(width: int, height: int, prompt: str = PROMPT, **fields: Any) -> GenerationRequest:
    return GenerationRequest(prompt=prompt, width=width, height=height, seed=42, **fields)


def _embedded(encoder: PromptEncoder, **fields: Any) -> dict[str, list[torch.Tensor]]:
    """The prompt as our encoder gives it, as arguments of diffusers."""
    embedding = encoder.encode(GenerationRequest(prompt=PROMPT, **fields))
    negative = {} if embedding.negative is None else {"negative_prompt_embeds": [embedding.negative]}
    return {"prompt_embeds": [embedding.embeds], **negative}


def _by_diffusers(pipeline: Any, prompt: dict[str, Any], **how: Any) -> Any:
    return pipeline(**prompt, **{"num_inference_steps": 8, "guidance_scale": 0.0, **how}).images


def _our_latents(
    pipeline: ZImagePipeline,
    request: GenerationRequest,
    monkeypatch: pytest.MonkeyPatch,
    inputs: Inputs | None = None,
) -> torch.Tensor:
    """What reaches the decoder."""
    seen: list[torch.Tensor] = []
    decode = PictureCoder.decode

    def recording(decoder: PictureCoder, latents: torch.Tensor, tiled: bool) -> Image.Image:
        seen.append(latents.clone())
        return decode(decoder, latents, tiled)

    with monkeypatch.context() as patched:
        patched.setattr(PictureCoder, "decode", recording)
        pipeline.generate(request, inputs=inputs)
    (latents,) = seen
    return latents


def _photo(width: int, height: int) -> Image.Image:
    """Something with edges and gradients."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    disc = ((across - 128) ** 2 + (down - 100) ** 2 < 60**2) * 255
    return Image.fromarray(np.stack([across, down, disc], -1).astype(np.uint8))


def _half_mask(width: int, height: int) -> Image.Image:
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (width // 2, 0, width, height))
    return mask


def _levels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, dtype=np.int16)
