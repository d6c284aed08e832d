"""The database's clock is set back: nothing waits until it shows the same time again."""

from datetime import datetime, timedelta
from uuid import UUID

import pytest
from sqlalchemy import select

from tests.integration.jobs.examples import HOOK, LEASE_S, Clock, claim, complete, fail, rescue, submit
from zcore.jobs import claims, leadership, recovery, webhooks, workers
from zcore.jobs.database import Database
from zcore.jobs.models import QueueEntry
from zcore.stages import Stage

WORK = "maintenance"
TERM_S = 8.0
HOUR_S = 3600.0


def take(database: Database, holder: str) -> bool:
    with database.write() as transaction:
        return leadership.take(transaction, WORK, holder, TERM_S)


def end_term(database: Database) -> float:
    with database.write() as transaction:
        return leadership.end_term_of_another_time(transaction, WORK, TERM_S)


def follow(database: Database, seconds: float) -> None:
    with database.write() as transaction:
        recovery.follow_clock(transaction, seconds)


def lease_until(database: Database, job_id: UUID) -> datetime:
    with database.read() as transaction:
        found = transaction.session.scalar(select(QueueEntry.lease_until).where(QueueEntry.job_id == job_id))
    assert found is not None
    return found


def test_nobody_leads_until_a_term_that_lasts_too_long_is_ended(database: Database, clock: Clock) -> None:
    assert take(database, "one")
    clock.advance(2.5 - HOUR_S)
    assert not take(database, "one")
    assert not take(database, "two")
    assert end_term(database) == pytest.approx(HOUR_S - 2.5)
    assert end_term(database) == 0
    assert take(database, "two")


def test_times_of_transactions_that_overlap_are_no_clock_set_back(database: Database, clock: Clock) -> None:
    assert take(database, "one")
    clock.advance(-5)
    assert end_term(database) == 0
    assert not take(database, "two")
    assert take(database, "one")


def test_the_job_of_a_dead_worker_is_rescued_after_its_lease(database: Database, clock: Clock) -> None:
    job = submit(database)
    claim(database)
    clock.advance(-HOUR_S)
    follow(database, HOUR_S)
    assert rescue(database) == []
    clock.advance(LEASE_S + 1)
    assert [rescued.id for rescued in rescue(database)] == [job.id]


def test_a_lease_that_was_renewed_since_then_is_left_alone(database: Database, clock: Clock) -> None:
    job = submit(database)
    lease = claim(database)
    clock.advance(-HOUR_S)
    with database.write() as transaction:
        assert claims.heartbeat(transaction, lease, LEASE_S) is not None
    follow(database, HOUR_S)
    assert lease_until(database, job.id) == clock.now + timedelta(seconds=LEASE_S)


def test_a_retry_comes_after_its_delay(database: Database, clock: Clock) -> None:
    job = submit(database)
    fail(database, claim(database))
    clock.advance(-HOUR_S)
    follow(database, HOUR_S)
    clock.advance(5)
    with database.write() as transaction:
        claims.promote(transaction)
    assert claim(database).job_id == job.id


def test_workers_are_notified_again(database: Database, clock: Clock) -> None:
    submit(database)
    clock.advance(-HOUR_S)
    follow(database, HOUR_S)
    clock.advance(1)
    with database.write() as transaction:
        assert recovery.mark_notified(transaction, Stage.GENERATE, 0.5, 10) == 1


def test_a_webhook_is_due(database: Database, clock: Clock) -> None:
    submit(database, webhook_url=HOOK)
    complete(database, claim(database))
    clock.advance(-HOUR_S)
    follow(database, HOUR_S)
    with database.write() as transaction:
        assert len(webhooks.claim_due(transaction, 10, hold_s=60)) == 1


def test_a_worker_that_died_is_not_present_for_long(database: Database, clock: Clock) -> None:
    with database.write() as transaction:
        workers.report(transaction, "worker-1", "demo", "cpu")
    clock.advance(-HOUR_S)
    follow(database, HOUR_S)
    clock.advance(workers.PRESENCE_TIMEOUT_S + 1)
    with database.read() as transaction:
        assert workers.count_present(transaction) == 0
