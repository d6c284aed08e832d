"""What a caller may change afterwards: cancel what has not ended, retry what ended badly."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.integration.jobs.examples import (
    DEFECT,
    HOOK,
    LEASE_S,
    Clock,
    cancel,
    claim,
    complete,
    events,
    fail,
    job_in,
    look,
    row,
    submit,
    told,
    wait_until_blocked,
)
from zcore.errors import Conflict, NotFound
from zcore.jobs import lifecycle
from zcore.jobs.database import Database
from zcore.jobs.models import Job
from zcore.jobs.states import State


def retry(database: Database, job_id: uuid.UUID, max_attempts: int = 3) -> Job:
    with database.write() as transaction:
        return lifecycle.retry(transaction, job_id, max_attempts)


def test_a_queued_job_is_canceled_at_once(database: Database, clock: Clock) -> None:
    job = submit(database, webhook_url=HOOK)
    clock.advance(1)
    assert cancel(database, job.id).status == State.CANCELED
    assert look(database, job.id).completed_at == clock.now
    assert events(database, job.id) == ["queued", "canceled"]
    assert told(database, job.id) == ["job.canceled"]
    with database.write() as transaction:
        assert lifecycle.claim(transaction, "worker-1", LEASE_S) is None


def test_a_running_job_is_canceled_when_its_worker_has_seen_the_wish(database: Database, clock: Clock) -> None:
    job = submit(database, webhook_url=HOOK)
    lease = claim(database)
    with database.write() as transaction:
        assert lifecycle.acknowledge_cancel(transaction, lease) is None  # nobody wished
    assert cancel(database, job.id).status == State.RUNNING
    assert look(database, job.id).cancel_requested_at == clock.now
    assert told(database, job.id) == []
    with database.write() as transaction:
        assert lifecycle.acknowledge_cancel(transaction, lease) is not None
    canceled = look(database, job.id)
    assert (canceled.status, canceled.lease_token) == (State.CANCELED, None)
    assert events(database, job.id) == ["queued", "claimed", "cancel_requested", "canceled"]
    assert told(database, job.id) == ["job.canceled"]


def test_a_wish_said_twice_is_one_wish(database: Database, clock: Clock) -> None:
    job = job_in(State.RUNNING, database, clock)
    first = cancel(database, job.id).cancel_requested_at
    clock.advance(3)
    assert cancel(database, job.id).cancel_requested_at == first
    assert events(database, job.id) == ["queued", "claimed", "cancel_requested"]


@pytest.mark.parametrize("state", [State.SUCCEEDED, State.FAILED, State.CANCELED, State.EXPIRED])
def test_canceling_an_ended_job_changes_nothing(database: Database, clock: Clock, state: State) -> None:
    job = job_in(state, database, clock, webhook_url=HOOK)
    before, events_before, told_before = row(job), events(database, job.id), told(database, job.id)
    assert cancel(database, job.id).status == state
    assert row(look(database, job.id)) == before
    assert (events(database, job.id), told(database, job.id)) == (events_before, told_before)


@pytest.mark.parametrize("state", [State.FAILED, State.CANCELED])
def test_a_job_that_ended_badly_gets_a_fresh_budget(database: Database, clock: Clock, state: State) -> None:
    job = job_in(state, database, clock, webhook_url=HOOK)
    clock.advance(60)
    retry(database, job.id, max_attempts=2)
    queued = look(database, job.id)
    assert (queued.status, queued.attempts_left, queued.attempt) == (State.QUEUED, 2, job.attempt)
    assert (queued.completed_at, queued.error_code, queued.error_message) == (None, None, None)
    assert queued.available_at == queued.announced_at == clock.now
    assert complete(database, claim(database)) is not None
    assert events(database, job.id)[-3:] == ["retried", "claimed", "succeeded"]
    assert told(database, job.id) == [f"job.{state}", "job.succeeded"]


def test_a_retried_job_has_forgotten_the_wish_to_cancel(database: Database) -> None:
    job = submit(database)
    lease = claim(database)
    cancel(database, job.id)
    fail(database, lease, DEFECT)
    retry(database, job.id)
    assert look(database, job.id).cancel_requested_at is None
    fail(database, claim(database), DEFECT)
    assert look(database, job.id).status == State.FAILED


@pytest.mark.parametrize("state", [State.QUEUED, State.RUNNING, State.SUCCEEDED, State.EXPIRED])
def test_only_a_job_that_ended_badly_can_be_retried(database: Database, clock: Clock, state: State) -> None:
    job = job_in(state, database, clock)
    before = row(job)
    with pytest.raises(Conflict, match=f"is {state}; only a failed or canceled job"):
        retry(database, job.id)
    assert row(look(database, job.id)) == before


def test_a_job_that_is_not_there_is_not_found(database: Database) -> None:
    nowhere = uuid.uuid4()
    with pytest.raises(NotFound, match=str(nowhere)):
        cancel(database, nowhere)
    with pytest.raises(NotFound, match=str(nowhere)):
        retry(database, nowhere)


def test_a_cancel_that_meets_a_claim_becomes_a_wish(postgresql: Database) -> None:
    job = submit(postgresql)
    with ThreadPoolExecutor(1) as pool:
        with postgresql.write() as transaction:
            lifecycle.claim(transaction, "worker-1", LEASE_S)
            canceling = pool.submit(cancel, postgresql, job.id)
            wait_until_blocked(postgresql)
        assert canceling.result(30).status == State.RUNNING
    assert look(postgresql, job.id).cancel_requested_at is not None


def test_two_retries_at_once_are_one_retry(postgresql: Database, clock: Clock) -> None:
    job = job_in(State.FAILED, postgresql, clock)
    with ThreadPoolExecutor(1) as pool:
        with postgresql.write() as transaction:
            lifecycle.retry(transaction, job.id, 3)
            second = pool.submit(retry, postgresql, job.id)
            wait_until_blocked(postgresql)
        with pytest.raises(Conflict):
            second.result(30)
    assert events(postgresql, job.id).count("retried") == 1
