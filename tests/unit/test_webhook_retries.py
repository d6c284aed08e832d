"""Retries of webhooks are spread, so that the events of one outage do not all return in the same second."""

import random

import pytest

from worker.webhooks.retry_schedule import retry_delay_s

SCHEDULE_S = (5.0, 300.0, 86_400.0)


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(1)


@pytest.mark.parametrize("attempt", [1, 2, 3])
def test_delays_are_spread_by_a_tenth_around_the_schedule(attempt: int) -> None:
    planned = SCHEDULE_S[attempt - 1]
    delays = [retry_delay_s(attempt, 500, None, SCHEDULE_S) or 0.0 for _ in range(1000)]
    assert 0.9 * planned <= min(delays) < 0.92 * planned
    assert 1.08 * planned < max(delays) <= 1.1 * planned
    assert sum(delays) / len(delays) == pytest.approx(planned, rel=0.01)
    assert len(set(delays)) > 990, "no two events share a delay"
