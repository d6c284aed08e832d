"""The passes of a request: sizes, noise levels, guidance."""

import pytest
import torch
from msgspec.structs import replace
from torch.nn import functional

from tests.numerics import ONE_KERNEL, assert_close_relative
from zcore.checkpoint.geometry import LatentSize
from zcore.imaging.sampling.multipass import enlarged, plan
from zcore.imaging.sampling.schedule import sigmas
from zcore.request import GenerationRequest, Pass


def request(*passes: Pass, **fields: object) -> GenerationRequest:
    return GenerationRequest(prompt="a", width=1024, height=768, steps=9, passes=passes, **fields)


def test_a_request_without_passes_is_one_pass_from_noise() -> None:
    (only,) = plan(request())
    assert (only.width, only.height, list(only.sigmas)) == (1024, 768, sigmas(9, 3.0))


def test_a_request_with_an_image_starts_at_its_strength() -> None:
    (only,) = plan(request(image="given:a", strength=0.4, strength_rule="diffusers"))
    assert list(only.sigmas) == sigmas(9, 3.0, 0.4, "diffusers")


def test_the_documented_two_passes() -> None:
    first, second = plan(request(Pass(scale=0.5, steps=9), Pass(scale=1.0, steps=9, strength=0.5)))
    assert (first.width, first.height, list(first.sigmas)) == (512, 384, sigmas(9, 3.0))
    assert (second.width, second.height, list(second.sigmas)) == (1024, 768, sigmas(9, 3.0, 0.5))


@pytest.mark.parametrize(("side", "scale", "scaled"), [(1440, 0.7, 1008), (1600, 0.57, 912), (800, 0.58, 464)])
def test_a_pass_at_an_exact_multiple_of_16_is_not_rounded_down(side: int, scale: float, scaled: int) -> None:
    first, _ = plan(replace(request(Pass(scale=scale), Pass(scale=1.0)), width=side))
    assert first.width == scaled


def test_a_pass_takes_what_it_omits_from_the_request() -> None:
    first, second = plan(
        request(Pass(scale=0.3, shift=1.0), Pass(scale=1.0, guidance_scale=0.0, steps=4), guidance_scale=3.0)
    )
    assert (first.width, first.height) == (304, 224)
    assert list(first.sigmas) == sigmas(9, 1.0)
    assert list(second.sigmas) == sigmas(4, 3.0, 0.5)
    assert (first.guidance.scale, second.guidance.scale) == (3.0, 0.0)


def test_the_first_pass_over_an_image_has_its_own_strength() -> None:
    first, _ = plan(request(Pass(scale=0.5, strength=0.3), Pass(scale=1.0), image="given:a", strength=0.9))
    assert list(first.sigmas) == sigmas(9, 3.0, 0.3)


def test_latents_grow_smoothly_and_keep_their_dtype() -> None:
    ramp = torch.linspace(-1, 1, 12).repeat(2, 16, 8, 1).to(torch.bfloat16)
    grown = enlarged(ramp, LatentSize(height=16, width=24))
    assert grown.shape == (2, 16, 16, 24)
    assert grown.dtype == torch.bfloat16
    inner = grown[1, 0, 3, 4:-4].float()
    positions = (torch.arange(24) + 0.5) / 2 - 0.5  # of the new latents, among the old ones
    # Inputs, weights and sums are rounded to bfloat16.
    assert_close_relative(inner.to(torch.bfloat16), (-1 + 2 * positions / 11)[4:-4], roundings=4)
    assert (inner.diff() > 0).all()


@pytest.mark.parametrize("height", [8, 16])
def test_latents_of_the_right_size_are_returned_unchanged(height: int) -> None:
    latents = torch.randn(1, 16, height, 12)
    assert enlarged(latents, LatentSize(height=height, width=12)) is latents


def test_a_constant_stays_constant() -> None:
    grown = enlarged(torch.full((1, 16, 4, 4), 0.7), LatentSize(height=8, width=10))
    assert_close_relative(
        grown, functional.interpolate(torch.full((1, 16, 4, 4), 0.7), size=(8, 10)), roundings=ONE_KERNEL
    )
