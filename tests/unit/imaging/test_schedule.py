"""The noise levels are those of the reference."""

from itertools import pairwise

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from zcore.imaging.sampling.schedule import sigmas

STEPS = st.integers(1, 50)
SHIFTS = st.floats(0.1, 20.0)


def test_eight_steps_at_shift_three_are_eight_forwards_on_the_published_grid() -> None:
    assert sigmas(8, 3.0) == pytest.approx([1, 21 / 22, 9 / 10, 5 / 6, 3 / 4, 9 / 14, 1 / 2, 3 / 10, 0], abs=1e-15)


def test_nine_steps_are_nine_forwards_on_their_own_grid() -> None:
    expected = [1, 0.96, 0.913, 0.857, 0.789, 0.706, 0.6, 0.462, 0.273, 0]
    assert sigmas(9, 3.0) == pytest.approx(expected, abs=5e-4)


def test_without_shift_the_levels_are_even() -> None:
    assert sigmas(4, 1.0) == pytest.approx([1, 0.75, 0.5, 0.25, 0])


@given(STEPS, SHIFTS)
def test_levels_fall_from_one_to_zero_without_a_wasted_step(steps: int, shift: float) -> None:
    levels = sigmas(steps, shift)
    assert len(levels) == steps + 1
    assert levels[0] == 1
    assert levels[-1] == 0
    assert all(level > following for level, following in pairwise(levels))


@given(STEPS, SHIFTS)
def test_levels_are_those_of_the_scheduler_in_diffusers(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=list(np.linspace(1.0, 1 / steps, steps)))
    assert sigmas(steps, shift) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


DIFFUSERS_FORWARDS = {
    0.1: (1, 0.300), 0.2: (2, 0.500), 0.25: (2, 0.500), 0.3: (3, 0.643), 0.4: (4, 0.750), 0.5: (4, 0.750),
    0.6: (5, 0.833), 0.7: (6, 0.900), 0.75: (6, 0.900), 0.8: (7, 0.955), 0.9: (8, 1.0), 1.0: (8, 1.0),
}  # fmt: skip


@pytest.mark.parametrize(("strength", "expected"), DIFFUSERS_FORWARDS.items())
def test_the_diffusers_rule_rounds_up_to_a_step_of_the_full_grid(strength: float, expected: tuple[int, float]) -> None:
    levels = sigmas(8, 3.0, strength, "diffusers")
    assert (len(levels) - 1, levels[0]) == (expected[0], pytest.approx(expected[1], abs=5e-4))
    assert levels == sigmas(8, 3.0)[-len(levels) :]


@given(STEPS, SHIFTS, st.floats(1e-6, 1.0))
def test_the_continuous_rule_starts_at_the_strength_itself(steps: int, shift: float, strength: float) -> None:
    levels = sigmas(steps, shift, strength)
    assert levels[0] == pytest.approx(shift * strength / (1 + (shift - 1) * strength))
    assert levels[-1] == 0
    assert all(level > following for level, following in pairwise(levels))
    assert len(levels) - 1 <= steps


@pytest.mark.parametrize("forwards", range(1, 9))
def test_at_whole_steps_both_rules_are_the_same(forwards: int) -> None:
    continuous = sigmas(8, 3.0, forwards / 8)
    assert continuous == pytest.approx(sigmas(8, 3.0, forwards / 8, "diffusers"))
    assert len(continuous) == forwards + 1


@given(STEPS, st.floats(1e-9, 1.0))
def test_every_strength_runs_at_least_one_step_by_either_rule(steps: int, strength: float) -> None:
    assert len(sigmas(steps, 3.0, strength)) >= 2
    assert len(sigmas(steps, 3.0, strength, "diffusers")) >= 2
