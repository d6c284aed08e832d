"""A phase stalls after a multiple of its earlier times or after the floor, and an attempt at its deadline."""

import pytest

from worker.phases import REMEMBERED_SHAPES, Phase, PhaseBudgets, StallWatch, shape_of
from zcore.request import GenerationRequest

FLOOR_S, LEAST_S, FACTOR, DEADLINE_S = 1800.0, 30.0, 20.0, 21_600.0
SHAPE = "1024x1024"


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def budgets() -> PhaseBudgets:
    return PhaseBudgets(FLOOR_S, LEAST_S, FACTOR)


@pytest.fixture
def watch(budgets: PhaseBudgets, clock: Clock) -> StallWatch:
    watch = StallWatch(budgets, DEADLINE_S, clock)
    watch.expect(SHAPE)
    return watch


def spend(watch: StallWatch, clock: Clock, phase: Phase, *times_s: float) -> None:
    """Pass through a phase several times."""
    for time_s in times_s:
        watch.enter(phase)
        clock.now += time_s
    watch.enter(Phase.WAIT)


def test_a_phase_without_earlier_times_has_the_floor(watch: StallWatch, clock: Clock) -> None:
    watch.enter(Phase.DENOISE)
    clock.now += FLOOR_S
    assert watch.stalled() is None
    clock.now += 1
    assert watch.stalled() == "the phase `denoise` made no progress for 1800 s"


def test_a_measured_phase_has_a_multiple_of_its_slowest_time_without_the_first(
    budgets: PhaseBudgets, watch: StallWatch, clock: Clock
) -> None:
    spend(watch, clock, Phase.DENOISE, 300.0, 2.0, 3.0, 2.5)
    assert budgets.budget_s(SHAPE, Phase.DENOISE) == 3.0 * FACTOR
    assert budgets.budget_s("another shape", Phase.DENOISE) == FLOOR_S
    assert budgets.budget_s(SHAPE, Phase.DECODE) == FLOOR_S


def test_a_fast_phase_still_has_the_least_budget(budgets: PhaseBudgets, watch: StallWatch, clock: Clock) -> None:
    spend(watch, clock, Phase.DECODE, 0.01, 0.01)
    assert budgets.budget_s(SHAPE, Phase.DECODE) == LEAST_S


def test_each_step_begins_anew(budgets: PhaseBudgets, watch: StallWatch, clock: Clock) -> None:
    spend(watch, clock, Phase.DENOISE, 1.0, 1.0)
    for _ in range(10):
        watch.enter(Phase.DENOISE)
        clock.now += LEAST_S
        assert watch.stalled() is None


def test_phases_that_wait_for_other_services_are_not_learned(
    budgets: PhaseBudgets, watch: StallWatch, clock: Clock
) -> None:
    spend(watch, clock, Phase.UPLOAD, 1.0, 1.0, 1.0)
    assert budgets.budget_s(SHAPE, Phase.UPLOAD) == FLOOR_S


def test_time_in_which_a_service_was_away_counts_against_nothing(watch: StallWatch, clock: Clock) -> None:
    watch.enter(Phase.UPLOAD)
    clock.now += 10 * DEADLINE_S
    watch.excuse(10 * DEADLINE_S)
    assert watch.stalled() is None
    clock.now += FLOOR_S + 1
    assert watch.stalled() is not None


def test_excused_time_of_an_earlier_phase_does_not_lengthen_the_current_one(watch: StallWatch, clock: Clock) -> None:
    watch.enter(Phase.FETCH)
    watch.excuse(FLOOR_S)
    watch.enter(Phase.DENOISE)
    clock.now += FLOOR_S + 1
    assert watch.stalled() is not None


def test_an_attempt_that_advances_for_ever_ends_at_its_deadline(watch: StallWatch, clock: Clock) -> None:
    for _ in range(int(DEADLINE_S / 100)):
        watch.enter(Phase.DENOISE)
        clock.now += 100.0
        assert watch.stalled() is None
    clock.now += 1.0
    assert watch.stalled() == "the attempt was not finished within 21600 s"


def test_after_a_fallback_earlier_times_say_nothing(budgets: PhaseBudgets, watch: StallWatch, clock: Clock) -> None:
    spend(watch, clock, Phase.DENOISE, 1.0, 1.0)
    watch.expect(None)
    spend(watch, clock, Phase.DENOISE, 200.0)
    assert budgets.budget_s(SHAPE, Phase.DENOISE) == LEAST_S, "and nothing is learned from it"
    watch.enter(Phase.DENOISE)
    clock.now += FLOOR_S
    assert watch.stalled() is None


def test_the_memory_of_shapes_is_bounded(budgets: PhaseBudgets) -> None:
    for shape in range(2 * REMEMBERED_SHAPES):
        for _ in range(2):
            budgets.observe(shape, Phase.DENOISE, 5.0)
    known = [shape for shape in range(2 * REMEMBERED_SHAPES) if budgets.budget_s(shape, Phase.DENOISE) != FLOOR_S]
    assert known == list(range(REMEMBERED_SHAPES, 2 * REMEMBERED_SHAPES))


def test_only_seeds_and_words_leave_the_shape_as_it_is() -> None:
    fox = GenerationRequest(prompt="a fox", seed=1)
    assert shape_of(fox) == shape_of(GenerationRequest(prompt="an owl", seed=2))
    different = [{"width": 512}, {"n": 2}, {"guidance_scale": 4.0}, {"prompt": "fox " * 100}, {"tiled_vae": True}]
    assert len({shape_of(GenerationRequest(**{"prompt": "a fox", **fields})) for fields in different}) == len(different)
    assert all(shape_of(GenerationRequest(**{"prompt": "a fox", **fields})) != shape_of(fox) for fields in different)
