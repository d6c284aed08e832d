"""Classifier-free guidance: its difference, its norm, its end."""

import pytest
import torch

from tests.numerics import ONE_KERNEL, assert_close_relative
from zcore.imaging.sampling.guidance import Guidance, guided

pytestmark = pytest.mark.numeric


def random_velocity(seed: int) -> torch.Tensor:
    return torch.randn(16, 4, 6, generator=torch.Generator().manual_seed(seed))


def test_the_prediction_moves_away_from_the_negative_one() -> None:
    positive, negative = random_velocity(1), random_velocity(2)
    assert_close_relative(guided(positive, negative, Guidance(2.0)), 3 * positive - 2 * negative, roundings=3)
    assert torch.equal(guided(positive, negative, Guidance(0.0)), positive)


@pytest.mark.parametrize("most", [0.5, 1.0, 1.5])
def test_normalization_limits_the_norm_relative_to_the_positive_prediction(most: float) -> None:
    positive, negative = random_velocity(1), random_velocity(2)
    free = guided(positive, negative, Guidance(5.0))
    bounded = guided(positive, negative, Guidance(5.0, normalization=most))
    assert free.norm() > most * positive.norm()
    assert_close_relative(bounded.norm(), most * positive.norm(), roundings=ONE_KERNEL)
    assert_close_relative(bounded / bounded.norm(), free / free.norm(), roundings=ONE_KERNEL)


def test_normalization_does_not_change_a_prediction_within_the_limit() -> None:
    positive, negative = random_velocity(1), random_velocity(1) * 0.9
    free = guided(positive, negative, Guidance(1.0))
    assert torch.equal(guided(positive, negative, Guidance(1.0, normalization=10.0)), free)


@pytest.mark.parametrize(
    ("truncation", "sigma", "active"),
    [(1.0, 0.0, True), (1.0, 1.0, True), (0.5, 0.6, True), (0.5, 0.5, True), (0.5, 0.49, False), (0.0, 0.99, False)],
)
def test_truncation_ends_guidance_at_low_noise(truncation: float, sigma: float, active: bool) -> None:
    assert Guidance(2.0, truncation=truncation).is_active(sigma) is active
    assert not Guidance(0.0, truncation=truncation).is_active(sigma)
