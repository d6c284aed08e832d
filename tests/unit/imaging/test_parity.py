"""Our loop computes what diffusers' own pipelines compute, on the same weights and embeddings, in float32; and our
embeddings are theirs.

Both are compared by themselves: the embeddings differ in their last bits, because diffusers pads every prompt to 512
tokens and we pad none, and a trained network amplifies that to more than the loop's own rounding.
"""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from tests.numerics import ONE_FORWARD, ONE_GENERATION, assert_close_relative, assert_levels_close
from zcore.imaging.network.vae import VaeCodec
from zcore.imaging.pipeline import Inputs, ZImagePipeline
from zcore.imaging.prompt_encoder import PromptEncoder
from zcore.request import GenerationRequest

PROMPT = "a red circle on a white background, large enough that its caption needs some padding"


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


@pytest.mark.numeric
def test_embeddings_are_those_of_diffusers(reference: diffusers.ZImagePipeline, encoder: PromptEncoder) -> None:
    for prompt in (PROMPT, "a", ""):
        (expected,), _ = reference.encode_prompt([prompt], do_classifier_free_guidance=False)
        embeds = encoder.encode(GenerationRequest(prompt=prompt)).embeds
        assert embeds.shape == expected.shape
        assert_close_relative(embeds, expected, roundings=ONE_FORWARD)


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
    assert_close_relative(latents, expected[0], roundings=ONE_GENERATION)


def test_a_seed_gives_the_same_image_as_in_diffusers(reference: diffusers.ZImagePipeline, ours: ZImagePipeline) -> None:
    (expected,) = _by_diffusers(
        reference,
        {"prompt": PROMPT},
        width=128,
        height=192,
        generator=torch.Generator().manual_seed(42),
        output_type="pil",
    )

    image = ours.generate(_request(128, 192)).images[0].image

    assert image.size == expected.size == (128, 192)
    assert_levels_close(image, expected)


@pytest.mark.numeric
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
    assert_close_relative(latents, expected[0], roundings=ONE_GENERATION, gain=1 + 2 * guidance["guidance_scale"])


@pytest.mark.parametrize("strength", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("masked", [False, True], ids=["img2img", "inpainting"])
def test_latents_from_an_image_equal_those_of_diffusers_under_its_strength_rule(
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
    assert_close_relative(latents, expected, roundings=ONE_GENERATION)


def test_a_call_written_for_diffusers_gives_what_it_gives_there(
    reference: diffusers.ZImagePipeline, ours: ZImagePipeline, encoder: PromptEncoder
) -> None:
    embedded = [encoder.encode(GenerationRequest(prompt=text, guidance_scale=1.0)) for text in (PROMPT, "a")]
    call: dict[str, Any] = {
        "prompt_embeds": [one.embeds for one in embedded],
        "negative_prompt_embeds": [one.negative for one in embedded],
        "width": 96,
        "height": 64,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "num_images_per_prompt": 2,
        "output_type": "latent",
    }
    for randomness in (
        lambda: {"generator": [torch.Generator().manual_seed(seed) for seed in range(4)]},
        lambda: {"generator": torch.Generator().manual_seed(7)},
        lambda: {"latents": torch.randn((4, 16, 8, 12), generator=torch.Generator().manual_seed(8))},
    ):
        expected = reference(**call, **randomness()).images
        latents = ours(**call, **randomness()).images
        assert latents.shape == expected.shape == (4, 16, 8, 12)
        assert expected.std() > 0.1
        assert_close_relative(latents, expected, roundings=ONE_GENERATION, gain=5)


def test_every_output_type_has_the_form_of_diffusers(reference: diffusers.ZImagePipeline, ours: ZImagePipeline) -> None:
    call: dict[str, Any] = {"width": 96, "height": 64, "num_inference_steps": 1, "guidance_scale": 0.0}
    for output_type in ("pil", "np", "pt", "latent"):
        noise = torch.randn((2, 16, 8, 12), generator=torch.Generator().manual_seed(8))
        expected, images = (
            pipe(["a", "b"], **call, latents=noise, output_type=output_type).images  # diffusers changes the list
            for pipe in (reference, ours)
        )
        assert len(images) == len(expected) == 2
        if output_type == "pil":
            for image, other in zip(images, expected, strict=True):
                assert_levels_close(image, other)
            continue
        assert type(images) is type(expected)
        assert images.dtype == expected.dtype
        assert images.shape == expected.shape
        if output_type != "latent":
            assert np.abs(np.asarray(images) - np.asarray(expected)).mean() < 1 / 255


def test_a_callback_written_for_diffusers_sees_and_steers_the_same_steps(
    reference: diffusers.ZImagePipeline, ours: ZImagePipeline, encoder: PromptEncoder
) -> None:
    def run(pipe: Any, stop_after: int) -> tuple[Any, list[tuple[int, float, torch.Tensor]]]:
        seen: list[tuple[int, float, torch.Tensor]] = []

        def callback(
            called: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]
        ) -> dict[str, torch.Tensor]:
            assert called is pipe
            seen.append((step, float(timestep), tensors["latents"].clone()))
            called._interrupt = step == stop_after
            return {"latents": tensors["latents"] * 0.9}

        images = pipe(
            prompt_embeds=[encoder.encode(PROMPT).embeds],
            width=64,
            height=96,
            num_inference_steps=3,
            guidance_scale=0.0,
            generator=torch.Generator().manual_seed(42),
            output_type="latent",
            callback_on_step_end=callback,
        ).images
        return images, seen

    for stop_after, steps in ((99, 3), (1, 2)):
        (expected, expected_steps), (latents, our_steps) = (run(pipe, stop_after) for pipe in (reference, ours))
        assert len(our_steps) == len(expected_steps) == steps
        assert_close_relative(latents, expected, roundings=ONE_GENERATION)
        for one, other in zip(our_steps, expected_steps, strict=True):
            assert one[:2] == pytest.approx(other[:2], rel=1e-6)
            assert_close_relative(one[2], other[2], roundings=ONE_GENERATION)


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
    decode = VaeCodec.decode_latents

    def recording(decoder: VaeCodec, latents: torch.Tensor, tiled: bool) -> Image.Image:
        seen.append(latents.clone())
        return decode(decoder, latents, tiled)

    with monkeypatch.context() as patched:
        patched.setattr(VaeCodec, "decode_latents", recording)
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
