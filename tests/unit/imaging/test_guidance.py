"""Guidance adds the difference, within its norm and its time."""

import pytest
import torch

from zcore.imaging.sampling.guidance import Guidance, guided


def drawn(seed: int) -> torch.Tensor:
    return torch.randn(16, 4, 6, generator=torch.Generator().manual_seed(seed))


def test_the_prediction_moves_away_from_the_negative_one() -> None:
    positive, negative = drawn(1), drawn(2)
    assert torch.allclose(guided(positive, negative, Guidance(2.0)), 3 * positive - 2 * negative, atol=1e-6)
    assert torch.equal(guided(positive, negative, Guidance(0.0)), positive)


@pytest.mark.parametrize("most", [0.5, 1.0, 1.5])
def test_normalization_bounds_the_norm_by_the_positive_ones(most: float) -> None:
    positive, negative = drawn(1), drawn(2)
    free = guided(positive, negative, Guidance(5.0))
    bounded = guided(positive, negative, Guidance(5.0, normalization=most))
    assert free.norm() > most * positive.norm()
    assert bounded.norm() == pytest.approx(float(most * positive.norm()), rel=1e-5)
    assert torch.allclose(bounded / bounded.norm(), free / free.norm(), atol=1e-6)


def test_normalization_leaves_what_is_within_it() -> None:
    positive, negative = drawn(1), drawn(1) * 0.9
    free = guided(positive, negative, Guidance(1.0))
    assert torch.equal(guided(positive, negative, Guidance(1.0, normalization=10.0)), free)


@pytest.mark.parametrize(
    ("truncation", "sigma", "active"),
    [(1.0, 0.0, True), (1.0, 1.0, True), (0.5, 0.6, True), (0.5, 0.5, True), (0.5, 0.49, False), (0.0, 0.99, False)],
)
def test_truncation_ends_guidance_where_the_picture_is_clear(truncation: float, sigma: float, active: bool) -> None:
    assert Guidance(2.0, truncation=truncation).is_active(sigma) is active
    assert not Guidance(0.0, truncation=truncation).is_active(sigma)
