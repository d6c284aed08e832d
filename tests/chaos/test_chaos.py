"""A short chaos run in the normal suite: what `make chaos` does for as long as one likes."""

import pytest

from tests.chaos.faults import FAULTS
from tests.chaos.run import Plan, run

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1200)]

# One of each kind of fault that the service must survive without a violation; those that end soon.
SHORT = (
    "worker_killed", "api_killed", "maintenance_terminated", "database_crashed", "database_commit_lost", "database_cut",
    "database_clock_set_back", "broker_flushed", "broker_killed", "storage_503", "storage_put_lost", "receiver_fails",
)  # fmt: skip


def test_no_rule_is_broken_while_faults_come_one_after_another() -> None:
    report = run(Plan(minutes=2, seed=1, faults=[FAULTS[name] for name in SHORT], callers=6))
    print(report)
    assert not report.violations
    assert len(report.facts.accepted) > 20
    assert report.recoveries
