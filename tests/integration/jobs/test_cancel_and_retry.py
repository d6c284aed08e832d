"""Callers can cancel a job that has not ended, and retry one that failed or was canceled."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.integration.jobs.examples import (
    HOOK,
    LEASE_S,
    PERMANENT,
    Clock,
    cancel,
    claim,
    complete,
    events,
    fail,
    fetch,
    job_in,
    row,
    submit,
    wait_until_blocked,
    webhook_types,
)
from zcore.errors import Conflict, NotFound
from zcore.jobs import claims, lifecycle
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
    assert fetch(database, job.id).completed_at == clock.now
    assert events(database, job.id) == ["queued", "canceled"]
    assert webhook_types(database, job.id) == ["job.canceled"]
    with database.write() as transaction:
        assert claims.claim(transaction, "worker-1", LEASE_S) is None


def test_a_running_job_is_canceled_when_its_worker_acknowledges_the_request(database: Database, clock: Clock) -> None:
    job = submit(database, webhook_url=HOOK)
    lease = claim(database)
    with database.write() as transaction:
        assert lifecycle.acknowledge_cancel(transaction, lease) is None  # cancellation was not requested
    assert cancel(database, job.id).status == State.RUNNING
    assert fetch(database, job.id).cancel_requested_at == clock.now
    assert webhook_types(database, job.id) == []
    with database.write() as transaction:
        assert lifecycle.acknowledge_cancel(transaction, lease) is not None
    canceled = fetch(database, job.id)
    assert (canceled.status, canceled.lease_token) == (State.CANCELED, None)
    assert events(database, job.id) == ["queued", "claimed", "cancel_requested", "canceled"]
    assert webhook_types(database, job.id) == ["job.canceled"]


def test_a_repeated_cancellation_request_changes_nothing(database: Database, clock: Clock) -> None:
    job = job_in(State.RUNNING, database, clock)
    first = cancel(database, job.id).cancel_requested_at
    clock.advance(3)
    assert cancel(database, job.id).cancel_requested_at == first
    assert events(database, job.id) == ["queued", "claimed", "cancel_requested"]


@pytest.mark.parametrize("state", [State.SUCCEEDED, State.FAILED, State.CANCELED, State.EXPIRED])
def test_canceling_an_ended_job_changes_nothing(database: Database, clock: Clock, state: State) -> None:
    job = job_in(state, database, clock, webhook_url=HOOK)
    before, events_before, webhooks_before = row(job), events(database, job.id), webhook_types(database, job.id)
    assert cancel(database, job.id).status == state
    assert row(fetch(database, job.id)) == before
    assert (events(database, job.id), webhook_types(database, job.id)) == (events_before, webhooks_before)


@pytest.mark.parametrize("state", [State.FAILED, State.CANCELED])
def test_a_retried_job_gets_a_new_budget_of_attempts(database: Database, clock: Clock, state: State) -> None:
    job = job_in(state, database, clock, webhook_url=HOOK)
    clock.advance(60)
    retry(database, job.id, max_attempts=2)
    queued = fetch(database, job.id)
    assert (queued.status, queued.attempts_left, queued.attempt) == (State.QUEUED, 2, job.attempt)
    assert (queued.completed_at, queued.error_code, queued.error_message) == (None, None, None)
    assert queued.available_at == queued.notified_at == clock.now
    assert complete(database, claim(database)) is not None
    assert events(database, job.id)[-3:] == ["retried", "claimed", "succeeded"]
    assert webhook_types(database, job.id) == [f"job.{state}", "job.succeeded"]


def test_a_retry_clears_the_cancellation_request(database: Database) -> None:
    job = submit(database)
    lease = claim(database)
    cancel(database, job.id)
    fail(database, lease, PERMANENT)
    retry(database, job.id)
    assert fetch(database, job.id).cancel_requested_at is None
    fail(database, claim(database), PERMANENT)
    assert fetch(database, job.id).status == State.FAILED


@pytest.mark.parametrize("state", [State.QUEUED, State.RUNNING, State.SUCCEEDED, State.EXPIRED])
def test_only_a_failed_or_canceled_job_can_be_retried(database: Database, clock: Clock, state: State) -> None:
    job = job_in(state, database, clock)
    before = row(job)
    with pytest.raises(Conflict, match=f"is {state}; only a failed or canceled job"):
        retry(database, job.id)
    assert row(fetch(database, job.id)) == before


def test_an_unknown_job_is_not_found(database: Database) -> None:
    nowhere = uuid.uuid4()
    with pytest.raises(NotFound, match=str(nowhere)):
        cancel(database, nowhere)
    with pytest.raises(NotFound, match=str(nowhere)):
        retry(database, nowhere)


def test_a_cancel_during_a_claim_becomes_a_cancellation_request(postgresql: Database) -> None:
    job = submit(postgresql)
    with ThreadPoolExecutor(1) as pool:
        with postgresql.write() as transaction:
            claims.claim(transaction, "worker-1", LEASE_S)
            canceling = pool.submit(cancel, postgresql, job.id)
            wait_until_blocked(postgresql)
        assert canceling.result(30).status == State.RUNNING
    assert fetch(postgresql, job.id).cancel_requested_at is not None


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
