"""DyPE: frequencies as published, plain ones if nothing needs stretching, and no state left behind."""

from math import ceil, floor, log, pi
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.numerics import assert_close_relative
from tests.unit.imaging.test_forward import LEVELS
from zcore.checkpoint.geometry import LatentSize
from zcore.imaging.network.dype import axis_rotations, ntk_frequencies, stretches, yarn_frequencies
from zcore.imaging.network.rope import caption_positions, frequencies, image_positions
from zcore.imaging.network.velocity_model import VelocityModel
from zcore.imaging.pipeline import ZImagePipeline
from zcore.imaging.weights.loader import Placement, load_transformer
from zcore.request import Dype, DypeMethod, GenerationRequest, Pass

THETA, DIMS = 256.0, (32, 48, 48)
METHODS: tuple[DypeMethod, ...] = ("vision_yarn", "yarn", "ntk")
BASE = [THETA ** (-2 * k / 48) for k in range(24)]


def ratios(found: torch.Tensor) -> list[float]:
    return [one / plain for one, plain in zip(found.tolist(), BASE, strict=True)]


# Published numbers


@pytest.mark.parametrize(
    ("power", "published"),
    [
        (2.0, [1, 0.9941, 0.9766, 0.9481, 0.9091, 0.8601, 0.8346, 0.8098, 0.7858, 0.71, 0.6439, 0.5871, 0.5393, 0.5]),
        (0.5, [1, 1, 1, 1, 1, 0.972, 0.9338, 0.8859, 0.8286, 0.7624, 0.6199, 0.5, 0.5, 0.5]),
        (0.0, [1] * 11 + [0.5] * 3),
    ],
)
def test_ramps_are_those_of_the_published_lists(power: float, published: list[float]) -> None:
    """The published lists have thresholds to a power, and twice the trained side of 64 positions."""
    thresholds = ((1.25**power, 0.75**power), (16.0**power, 2.0**power))
    found = ratios(yarn_frequencies(THETA, 48, 64, (2, 2), thresholds))
    assert found == pytest.approx([*published, *[0.5] * 10], abs=6e-5)


@pytest.mark.parametrize(("sigma", "factor"), [(1.0, 4.2485), (0.5, 1.4357), (0.0, 1.0)])
def test_ntk_raises_theta_by_the_published_factors(sigma: float, factor: float) -> None:
    dype = Dype(method="ntk")
    _, rows, columns = axis_rotations(dype, THETA, DIMS, (128, 128), sigma)
    assert rows.frequencies.tolist() == pytest.approx([(THETA * factor) ** (-2 * k / 48) for k in range(24)], rel=2e-5)
    assert torch.equal(rows.frequencies, columns.frequencies)
    assert rows.amplitude == 1.0


# Derived here independently, number by number


def by_hand(k: int, linear: float, ntk: float, kappa: float) -> float:
    """Compute one frequency of a 48 channel axis trained on 64 positions."""

    def share(rotations: tuple[float, float]) -> float:
        index = [48 * log(64 / (2 * pi * count)) / (2 * log(THETA)) for count in rotations]
        low, high = floor(min(max(index[0], 0), 24)), ceil(min(max(index[1], 0), 24))
        return 1.0 if k >= high > low else 0.0 if k <= low else min(1.0, (k - low) / max(high - low, 1e-3))

    plain = THETA ** (-2 * k / 48)
    slow = plain / linear * share((1.25 * kappa, 0.75 * kappa))
    slow += (THETA * ntk ** (48 / 46)) ** (-2 * k / 48) * (1 - share((1.25 * kappa, 0.75 * kappa)))
    to_plain = share((16 * kappa, 2 * kappa))
    return slow * to_plain + plain * (1 - to_plain)


@pytest.mark.parametrize("sigma", [1.0, 0.9, 0.5, 0.3])
def test_vision_yarn_is_linear_by_each_side_and_ntk_by_the_longer(sigma: float) -> None:
    frames, rows, columns = axis_rotations(Dype(start_sigma=0.5), THETA, DIMS, (96, 256), sigma)
    assert torch.equal(frames.frequencies, frequencies(THETA, DIMS)[0])
    assert rows.frequencies.tolist() == pytest.approx([by_hand(k, 1.5, 4.0, sigma**2) for k in range(24)])
    assert columns.frequencies.tolist() == pytest.approx([by_hand(k, 4.0, 4.0, sigma**2) for k in range(24)])
    assert frames.amplitude == 1.0
    assert rows.amplitude == columns.amplitude == pytest.approx(1 + 0.1 * log(4) * min(1.0, sigma / 0.5) ** 2)


@pytest.mark.parametrize(("anisotropic", "scales"), [(False, (4.0, 4.0)), (True, (1.0, 4.0))])
def test_yarn_has_one_scale_or_each_sides_own(anisotropic: bool, scales: tuple[float, float]) -> None:
    dype = Dype(method="yarn", scale=3.0, exponent=1.0, anisotropic=anisotropic)
    _, *spatial = axis_rotations(dype, THETA, DIMS, (32, 256), 0.5)
    for axis, scale in zip(spatial, scales, strict=True):
        assert axis.frequencies.tolist() == pytest.approx([by_hand(k, scale, scale, 1.5 * 0.5) for k in range(24)])
        assert axis.amplitude == pytest.approx(1 + 0.1 * log(scale))


@pytest.mark.parametrize("method", METHODS)
def test_the_static_forms_do_not_depend_on_the_noise_level(method: DypeMethod) -> None:
    dype = Dype(method=method, dynamic=False, scale=5.0)
    first, last = (axis_rotations(dype, THETA, DIMS, (128, 128), sigma)[1] for sigma in (1.0, 0.01))
    assert torch.equal(first.frequencies, last.frequencies)
    expected = [by_hand(k, 2, 2, 1.0) for k in range(24)]
    if method == "ntk":
        expected = [(THETA * 2 ** (48 / 46)) ** (-2 * k / 48) for k in range(24)]
    assert first.frequencies.tolist() == pytest.approx(expected)
    assert first.amplitude == last.amplitude == pytest.approx(1.0 if method == "ntk" else 1 + 0.1 * log(2))


@given(
    st.sampled_from(METHODS),
    st.floats(0, 1),
    st.tuples(st.integers(4, 512), st.integers(4, 512)),
    st.sampled_from([64, 128, 1024]),
    st.sampled_from([DIMS, (8, 12, 12)]),
    st.booleans(),
)
def test_frequencies_lie_between_linear_and_plain_ones(
    method: DypeMethod, sigma: float, patches: tuple[int, int], base: int, dims: tuple[int, ...], anisotropic: bool
) -> None:
    dype = Dype(method=method, base_resolution=base, anisotropic=anisotropic, scale=1.0 if method == "ntk" else 2.0)
    most = max(1.0, max(patches) * 16 / base)
    for axis, plain in zip(axis_rotations(dype, THETA, dims, patches, sigma), frequencies(THETA, dims), strict=True):
        assert (axis.frequencies <= plain * (1 + 1e-9)).all()
        assert (axis.frequencies >= plain / most * (1 - 1e-9)).all()
        assert 1 <= axis.amplitude <= 1 + 0.1 * log(most) + 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_the_stretch_decreases_with_the_noise(method: DypeMethod) -> None:
    """It ends at none, where the authors' code divides by zero, and never becomes linear shortly before."""
    plain = frequencies(THETA, DIMS)[1]

    def stretched(sigma: float) -> float:
        return float(
            (axis_rotations(Dype(method=method), THETA, DIMS, (256, 256), sigma)[1].frequencies / plain).mean()
        )

    levels = [1.0, 0.9, 0.6, 0.3, 0.1, 0.04, 0.02, 0.001, 0.0]
    means = [stretched(sigma) for sigma in levels]
    assert means == sorted(means)
    assert means[0] < 0.6
    assert means[-1] == 1.0


# Plans and images


def test_ntk_of_no_scale_is_plain() -> None:
    assert torch.equal(ntk_frequencies(THETA, 48, 1.0), frequencies(THETA, [48])[0])


@pytest.mark.parametrize("dype", [Dype(base_resolution=256), Dype(base_resolution=64, scale=0)])
def test_up_to_the_trained_size_nothing_is_stretched(dype: Dype) -> None:
    assert not stretches(dype, 256, 128)
    assert stretches(Dype(base_resolution=64), 64, 80)
    assert not stretches(None, 4096, 4096)


def test_a_plan_has_one_table_per_step(tiny_folder: Path) -> None:
    cpu = torch.device("cpu")
    model = VelocityModel(load_transformer(tiny_folder, Placement(cpu, torch.float32)), cpu, torch.float32)
    dype, size, dims = Dype(base_resolution=64), LatentSize(12, 20), (8, 12, 12)
    with torch.inference_mode():
        plan = model.plan(torch.zeros(5, 64), size, LEVELS, dype)
    assert len(plan.rotary) == 8
    positions = torch.cat((image_positions(33, 6, 10, 64), caption_positions(32)))
    for step in (0, 5):
        rotations = axis_rotations(dype, THETA, dims, (6, 10), LEVELS[step])
        table = plan.rotary_at(step)
        assert table.first.shape == (1, 96, 16, 2)
        angles = torch.cat([positions[:, i, None] * axis.frequencies for i, axis in enumerate(rotations)], -1)
        # An angle of 64 radians, rounded to float32, is off by 64 half epsilons; so are its sine and cosine.
        largest = ceil(float(angles.max()))
        lengths = torch.cat([torch.full((len(axis.frequencies),), axis.amplitude) for axis in rotations])
        assert_close_relative(table.first[0, ..., 0], (angles.cos() * lengths).float(), roundings=largest)
        assert_close_relative(table.first[0, ..., 1], (angles.sin() * lengths).float(), roundings=largest)


def generated(pipeline: ZImagePipeline, **fields: Any) -> bytes:
    all_fields: dict[str, Any] = {"width": 96, "height": 128, "steps": 2, "seed": 3, **fields}
    return pipeline.generate(GenerationRequest(prompt="a red circle", **all_fields)).images[0].image.tobytes()


def test_stretching_changes_the_image_and_leaves_no_state_behind(tiny_pipeline: ZImagePipeline) -> None:
    before = generated(tiny_pipeline)
    stretched = [generated(tiny_pipeline, dype=Dype(method=method, base_resolution=64)) for method in METHODS]
    assert len({before, *stretched}) == 4
    assert generated(tiny_pipeline) == before
    assert generated(tiny_pipeline, dype=Dype(base_resolution=128)) == before


def test_it_works_with_both_guidances_and_passes(tiny_pipeline: ZImagePipeline) -> None:
    dype = Dype(base_resolution=64)
    guided = {"guidance_scale": 2.0}
    assert generated(tiny_pipeline, dype=dype, **guided) != generated(tiny_pipeline, **guided)
    plain, whole, second, none = (
        generated(tiny_pipeline, passes=(Pass(scale=0.75), Pass(scale=1.0, dype=own)), dype=of_all)
        for own, of_all in ((None, None), (None, dype), (dype, None), (Dype(scale=0), dype))
    )
    assert len({plain, whole, second, none}) == 4


def test_the_authors_notice_is_recorded_with_affected_images(tiny_pipeline: ZImagePipeline) -> None:
    def described(**fields: Any) -> dict[str, str]:
        return tiny_pipeline.describe(GenerationRequest(prompt="a", width=128, height=128, **fields))

    assert "patent pending" in described(dype=Dype(base_resolution=64))["dype_notice"]
    assert "dype_notice" in described(passes=(Pass(scale=1.0, dype=Dype(base_resolution=64)),))
    for fields in ({}, {"dype": Dype()}, {"dype": Dype(base_resolution=64, dynamic=False)}):
        assert "dype_notice" not in described(**fields)
