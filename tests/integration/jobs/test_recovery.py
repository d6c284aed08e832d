"""Maintenance: expired retention times and lost notifications."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlalchemy import select, update

from tests.integration.jobs.examples import (
    HOOK,
    RETENTION_S,
    RETRY_DELAY_S,
    TRANSIENT,
    Clock,
    claim,
    complete,
    events,
    fail,
    fetch,
    job_in,
    row,
    submit,
    webhook_types,
)
from tests.statements import counted
from zcore.jobs import claims, lifecycle, queries, recovery
from zcore.jobs.database import Database, Transaction
from zcore.jobs.models import QueueEntry
from zcore.jobs.states import State
from zcore.stages import Stage

OVERDUE_S = 10.0


def mark_notified(database: Database, limit: int = 100, stage: Stage = Stage.GENERATE) -> int:
    with database.write() as transaction:
        return recovery.mark_notified(transaction, stage, OVERDUE_S, limit)


def promote(database: Database) -> int:
    with database.write() as transaction:
        return claims.promote(transaction)


def test_a_job_expires_exactly_at_the_end_of_its_retention(database: Database, clock: Clock) -> None:
    job = job_in(State.SUCCEEDED, database, clock, webhook_url=HOOK)
    clock.advance(RETENTION_S - 0.001)
    with database.write() as transaction:
        assert queries.past_retention(transaction, 10) == []
        assert recovery.expire(transaction, job.id) is None
    clock.advance(0.001)
    with database.write() as transaction:
        assert [due.id for due in queries.past_retention(transaction, 10)] == [job.id]
        assert recovery.expire(transaction, job.id) is not None
        assert recovery.expire(transaction, job.id) is None
        assert queries.past_retention(transaction, 10) == []
    assert fetch(database, job.id).status == State.EXPIRED
    assert events(database, job.id)[-1] == "expired"
    assert webhook_types(database, job.id) == ["job.succeeded"]


def test_the_earliest_to_expire_comes_first(database: Database, clock: Clock) -> None:
    ids = []
    for _ in range(3):
        ids.append(job_in(State.SUCCEEDED, database, clock).id)
        clock.advance(1)
    clock.advance(RETENTION_S)
    with database.read() as transaction:
        assert [job.id for job in queries.past_retention(transaction, 2)] == ids[:2]


@pytest.mark.parametrize("state", [State.QUEUED, State.RUNNING, State.FAILED, State.CANCELED])
def test_only_a_succeeded_job_expires(database: Database, clock: Clock, state: State) -> None:
    job = job_in(state, database, clock)
    clock.advance(RETENTION_S * 10)
    before = row(fetch(database, job.id))
    with database.write() as transaction:
        assert recovery.expire(transaction, job.id) is None
    assert row(fetch(database, job.id)) == before


def test_a_new_job_counts_as_notified_until_the_notification_is_overdue(database: Database, clock: Clock) -> None:
    submit(database)
    clock.advance(OVERDUE_S)
    assert mark_notified(database) == 0
    clock.advance(0.001)
    assert mark_notified(database) == 1
    assert mark_notified(database) == 0
    clock.advance(OVERDUE_S + 1)
    assert mark_notified(database) == 1


def test_a_job_that_waits_for_its_retry_is_notified_when_it_is_due(database: Database, clock: Clock) -> None:
    submit(database)
    fail(database, claim(database), TRANSIENT)
    assert mark_notified(database) == 0
    clock.advance(RETRY_DELAY_S)
    promote(database)
    assert mark_notified(database) == 1


def test_a_released_job_is_notified_at_once(database: Database) -> None:
    submit(database)
    lease = claim(database)
    with database.write() as transaction:
        lifecycle.release(transaction, lease)
    assert mark_notified(database) == 1


def test_notifications_are_limited_and_the_best_job_comes_first(database: Database, clock: Clock) -> None:
    jobs = [submit(database, priority=priority) for priority in (0, 5, 1)]
    clock.advance(OVERDUE_S + 1)
    assert mark_notified(database, limit=2) == 2
    assert [fetch(database, job.id).notified_at == clock.now for job in jobs] == [False, True, True]


def test_only_queued_jobs_are_notified(database: Database, clock: Clock) -> None:
    submit(database)
    submit(database)
    claim(database)
    complete(database, claim(database))
    clock.advance(OVERDUE_S * 100)
    assert mark_notified(database) == 0


def test_notifying_again_locks_no_mark(postgresql: Database, clock: Clock) -> None:
    """Marks locked twice in a transaction would not be locked in one order, and two transactions could deadlock."""
    for stage in Stage:
        submit(postgresql, stage=stage)
        fail(postgresql, claim(postgresql), TRANSIENT)
    clock.advance(RETRY_DELAY_S)
    with counted(postgresql) as asked, postgresql.write() as transaction:
        for stage in Stage:
            recovery.mark_notified(transaction, stage, OVERDUE_S, 10)
    assert not [statement for statement in asked.statements if "queue_marks" in statement]


def test_transactions_that_move_marks_never_deadlock(postgresql: Database) -> None:
    levels = [(stage, priority) for stage in Stage for priority in (-1, 0, 1)]
    jobs = [submit(postgresql, stage=stage, priority=priority) for stage, priority in levels * 4]

    def advance(transaction: Transaction) -> None:
        claims.advance_marks(transaction)
        claims.repair_marks(transaction)

    def lower(transaction: Transaction) -> None:
        claims.lower_marks(transaction, [(job.stage, job.priority, job.id) for job in random.sample(jobs, 5)])

    def schedule(transaction: Transaction) -> None:
        some = select(QueueEntry.job_id).limit(6).with_for_update(skip_locked=True)
        transaction.session.execute(
            update(QueueEntry)
            .where(QueueEntry.job_id.in_(some))
            .values(scheduled=True)
            .execution_options(synchronize_session=False)
        )

    def repeat(work: Callable[[Transaction], object]) -> None:
        for _ in range(60):
            with postgresql.write() as transaction:
                work(transaction)

    works: list[Callable[[Transaction], object]] = [claims.promote, advance, lower, schedule, claims.promote, lower]
    with ThreadPoolExecutor(len(works)) as pool:
        for repeated in [pool.submit(repeat, work) for work in works]:
            repeated.result(120)


def test_the_database_clock_is_utc(each_database_url: str) -> None:
    """Without an injected clock, because processes must agree about leases."""
    opened = Database(each_database_url)
    with opened.read() as transaction:
        first = transaction.now
    with opened.read() as transaction:
        second = transaction.now
    opened.close()
    assert first.utcoffset() == timedelta(0)
    assert timedelta(0) <= second - first < timedelta(minutes=1)
