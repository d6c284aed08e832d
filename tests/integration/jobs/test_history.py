"""Jobs that ended long ago are deleted with everything that belongs to them; nothing that is still needed is."""

import uuid

import pytest
from sqlalchemy import func, select

from tests.integration.jobs.examples import (
    HOOK,
    PERMANENT,
    RETENTION_S,
    Clock,
    claim,
    fail,
    fetch,
    job_in,
    submission,
)
from zcore.errors import NotFound
from zcore.jobs import history, leftovers, lifecycle, queries, webhooks
from zcore.jobs.database import Database
from zcore.jobs.models import ONLY_ON, SEARCH_INDEX, Leftover, QueueMark, Sweep, Table
from zcore.jobs.queries import JobFilter
from zcore.jobs.states import State
from zcore.jobs.webhooks import AttemptOutcome

DAY_S = 86_400.0
WEEK_S = 7 * DAY_S
"""On PostgreSQL a week that is not over yet is left to be dropped as a whole."""
AGE_S = 30 * DAY_S
DELIVERED = AttemptOutcome(True, 204, "", 35, None)
STAYS = (State.QUEUED, State.RUNNING, State.SUCCEEDED)


def forget(database: Database, age_s: float = AGE_S, limit: int = 100) -> int:
    with database.write() as transaction:
        return history.forget(transaction, age_s, limit)


def delete_leftovers(database: Database) -> None:
    """Delete the rows of the objects that ended jobs may have left, as if the objects were deleted."""
    with database.write() as transaction:
        for leftover in transaction.session.scalars(select(Leftover)).all():
            leftovers.forget(transaction, leftover)


def deliver_webhooks(database: Database) -> None:
    with database.write() as transaction:
        for due in webhooks.claim_due(transaction, 10, 60):
            webhooks.record_attempt(transaction, due, DELIVERED)


def rows(database: Database) -> dict[str, int]:
    """Return the number of rows of each table that has any, but for those that an empty installation has too."""
    kind = database.engine.dialect.name
    tables = [table for table in Table.metadata.sorted_tables if table.info.get(ONLY_ON, kind) == kind]
    with database.read() as transaction:
        counts = {
            table.name: transaction.session.scalar(select(func.count()).select_from(table)) or 0
            for table in [*tables, *([SEARCH_INDEX] if kind == "sqlite" else [])]
            if table not in (QueueMark.__table__, Sweep.__table__)
        }
    return {name: count for name, count in counts.items() if count}


@pytest.mark.parametrize("state", sorted(set(State) - set(STAYS)))
def test_an_old_job_is_deleted_with_everything_that_belongs_to_it(
    database: Database, clock: Clock, state: State
) -> None:
    job = job_in(state, database, clock, webhook_url=HOOK)
    deliver_webhooks(database)
    delete_leftovers(database)
    clock.advance(AGE_S - 1 if state != State.EXPIRED else AGE_S - RETENTION_S - 1)
    assert forget(database) == 0
    assert "job_events" in rows(database)
    clock.advance(WEEK_S)
    assert forget(database) == 1
    assert rows(database) == {}
    with pytest.raises(NotFound):
        fetch(database, job.id)


@pytest.mark.parametrize("state", STAYS)
def test_a_job_that_is_active_or_has_images_stays(database: Database, clock: Clock, state: State) -> None:
    job_in(state, database, clock)
    before = rows(database)
    clock.advance(10 * AGE_S)
    assert forget(database) == 0
    assert rows(database) == before


def test_a_job_stays_until_its_leftover_objects_are_deleted(database: Database, clock: Clock) -> None:
    job_in(State.FAILED, database, clock)
    clock.advance(10 * AGE_S)
    assert forget(database) == 0
    delete_leftovers(database)
    assert forget(database) == 1


def test_a_job_stays_until_its_webhook_is_delivered(database: Database, clock: Clock) -> None:
    job_in(State.CANCELED, database, clock, webhook_url=HOOK)
    clock.advance(10 * AGE_S)
    assert forget(database) == 0
    deliver_webhooks(database)
    assert forget(database) == 1


def test_the_age_of_a_job_begins_with_its_end(database: Database, clock: Clock) -> None:
    job = job_in(State.CANCELED, database, clock)
    clock.advance(AGE_S - 1)
    with database.write() as transaction:
        lifecycle.retry(transaction, job.id, 3)
    fail(database, claim(database), PERMANENT)
    delete_leftovers(database)
    clock.advance(AGE_S - 1)
    assert forget(database) == 0
    clock.advance(WEEK_S)
    assert forget(database) == 1


def test_the_oldest_jobs_go_first_and_not_more_than_asked_for(database: Database, clock: Clock) -> None:
    jobs = [job_in(State.CANCELED, database, clock) for _ in range(3)]
    clock.advance(AGE_S + WEEK_S)
    young = job_in(State.CANCELED, database, clock)
    assert forget(database, limit=2) == 2
    assert fetch(database, jobs[2].id).status == State.CANCELED
    assert (forget(database, limit=2), forget(database, limit=2)) == (1, 0)
    assert fetch(database, young.id).status == State.CANCELED


def test_a_deleted_job_is_not_found_by_its_words(database: Database, clock: Clock) -> None:
    job_in(State.CANCELED, database, clock, prompt="a walrus")
    clock.advance(AGE_S + WEEK_S)
    younger = job_in(State.CANCELED, database, clock, prompt="another walrus")
    forget(database)
    with database.read() as transaction:
        page = queries.page(transaction, JobFilter(text="walrus"), None, 10)
    assert [job.id for job in page.jobs] == [younger.id]


def test_an_idempotency_key_never_leads_to_a_deleted_job(database: Database, clock: Clock) -> None:
    """However short the history is, a key leads to its job for a day."""

    def submit_once() -> uuid.UUID:
        with database.write() as transaction:
            return lifecycle.submit(transaction, submission(), "anna", "0" * 64, 3, "key-1").job.id

    first = submit_once()
    with database.write() as transaction:
        lifecycle.cancel(transaction, first)
    clock.advance(86_399)
    assert forget(database, age_s=1) == 0
    assert submit_once() == first
    clock.advance(WEEK_S)
    assert forget(database, age_s=1) == 1
    assert submit_once() != first


def test_a_retry_at_the_same_time_finds_the_job_or_keeps_it(postgresql: Database, clock: Clock) -> None:
    job = job_in(State.CANCELED, postgresql, clock)
    clock.advance(AGE_S + WEEK_S)
    with postgresql.write() as transaction:
        lifecycle.retry(transaction, job.id, 3)
        assert forget(postgresql) == 0
    assert fetch(postgresql, job.id).status == State.QUEUED
