"""What the clock work asks and changes: retention that is over, doorbells that were lost."""

from datetime import timedelta

import pytest

from tests.integration.jobs.examples import (
    HOOK,
    RETENTION_S,
    RETRY_DELAY_S,
    SLIP,
    Clock,
    claim,
    complete,
    events,
    fail,
    job_in,
    look,
    row,
    submit,
    told,
)
from zcore.jobs import lifecycle, queries
from zcore.jobs.database import Database
from zcore.jobs.states import State
from zcore.stages import Stage

SILENT_S = 10.0


def mark_announced(database: Database, at_most: int = 100, stage: Stage = Stage.GENERATE) -> int:
    with database.write() as transaction:
        return lifecycle.mark_announced(transaction, stage, SILENT_S, at_most)


def test_a_job_expires_when_its_retention_is_over_and_not_before(database: Database, clock: Clock) -> None:
    job = job_in(State.SUCCEEDED, database, clock, webhook_url=HOOK)
    clock.advance(RETENTION_S - 0.001)
    with database.write() as transaction:
        assert queries.past_retention(transaction, 10) == []
        assert lifecycle.expire(transaction, job.id) is None
    clock.advance(0.001)
    with database.write() as transaction:
        assert [due.id for due in queries.past_retention(transaction, 10)] == [job.id]
        assert lifecycle.expire(transaction, job.id) is not None
        assert lifecycle.expire(transaction, job.id) is None
        assert queries.past_retention(transaction, 10) == []
    assert look(database, job.id).status == State.EXPIRED
    assert events(database, job.id)[-1] == "expired"
    assert told(database, job.id) == ["job.succeeded"]


def test_what_expires_first_is_purged_first(database: Database, clock: Clock) -> None:
    ids = []
    for _ in range(3):
        ids.append(job_in(State.SUCCEEDED, database, clock).id)
        clock.advance(1)
    clock.advance(RETENTION_S)
    with database.read() as transaction:
        assert [job.id for job in queries.past_retention(transaction, 2)] == ids[:2]


@pytest.mark.parametrize("state", [State.QUEUED, State.RUNNING, State.FAILED, State.CANCELED])
def test_only_pictures_expire(database: Database, clock: Clock, state: State) -> None:
    job = job_in(state, database, clock)
    clock.advance(RETENTION_S * 10)
    before = row(look(database, job.id))
    with database.write() as transaction:
        assert lifecycle.expire(transaction, job.id) is None
    assert row(look(database, job.id)) == before


def test_a_fresh_job_counts_as_announced_until_it_has_waited_too_long(database: Database, clock: Clock) -> None:
    submit(database)
    clock.advance(SILENT_S)
    assert mark_announced(database) == 0
    clock.advance(0.001)
    assert mark_announced(database) == 1
    assert mark_announced(database) == 0
    clock.advance(SILENT_S + 1)
    assert mark_announced(database) == 1


def test_a_postponed_job_is_announced_when_its_time_has_come(database: Database, clock: Clock) -> None:
    submit(database)
    fail(database, claim(database), SLIP)
    assert mark_announced(database) == 0
    clock.advance(RETRY_DELAY_S)
    assert mark_announced(database) == 1


def test_a_job_handed_back_is_announced_at_once(database: Database) -> None:
    submit(database)
    lease = claim(database)
    with database.write() as transaction:
        lifecycle.hand_back(transaction, lease)
    assert mark_announced(database) == 1


def test_at_most_so_many_are_announced_the_best_first(database: Database, clock: Clock) -> None:
    jobs = [submit(database, priority=priority) for priority in (0, 5, 1)]
    clock.advance(SILENT_S + 1)
    assert mark_announced(database, at_most=2) == 2
    assert [look(database, job.id).announced_at == clock.now for job in jobs] == [False, True, True]


def test_nobody_is_called_for_jobs_that_do_not_wait(database: Database, clock: Clock) -> None:
    submit(database)
    submit(database)
    claim(database)
    complete(database, claim(database))
    clock.advance(SILENT_S * 100)
    assert mark_announced(database) == 0


def test_the_databases_own_clock_is_utc(each_database_url: str) -> None:
    """Without an injected clock: two processes have to agree about leases."""
    opened = Database(each_database_url)
    with opened.read() as transaction:
        first = transaction.now
    with opened.read() as transaction:
        second = transaction.now
    opened.close()
    assert first.utcoffset() == timedelta(0)
    assert timedelta(0) <= second - first < timedelta(minutes=1)
