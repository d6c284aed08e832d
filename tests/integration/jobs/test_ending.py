"""Ends of an attempt: success, failure, release, or a lost worker."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, update
from sqlalchemy.exc import IntegrityError

from tests.integration.jobs.examples import (
    HOOK,
    LEASE_S,
    PERMANENT,
    RETENTION_S,
    RETRY_DELAY_S,
    TRANSIENT,
    Clock,
    cancel,
    claim,
    complete,
    events,
    fail,
    fetch,
    job_in,
    rescue,
    row,
    stored_image,
    submit,
    wait_until_blocked,
    webhook_types,
)
from zcore.jobs import claims, lifecycle, queries
from zcore.jobs.claims import Lease
from zcore.jobs.database import Database
from zcore.jobs.models import Job, QueueEntry
from zcore.jobs.states import State


def release(database: Database, lease: Lease) -> Job | None:
    with database.write() as transaction:
        return lifecycle.release(transaction, lease)


def test_success_stores_outputs_event_and_webhook_event_together(database: Database, clock: Clock) -> None:
    job = submit(database, webhook_url=HOOK, metadata={"order": 7}, n=2)
    lease = claim(database)
    clock.advance(4)
    returned = complete(database, lease, [stored_image(1), stored_image(0)])
    assert returned is not None
    stored = fetch(database, job.id)
    assert (stored.status, stored.completed_at) == (State.SUCCEEDED, clock.now)
    assert stored.expires_at == clock.now + timedelta(seconds=RETENTION_S)
    assert (stored.lease_token, stored.lease_until) == (None, None)
    assert (stored.metrics, stored.engine) == ({"total_ms": 5}, {"device": "cpu"})
    assert [(output.position, output.seed) for output in stored.outputs] == [(0, 7), (1, 8)]
    assert events(database, job.id) == ["queued", "claimed", "succeeded"]
    with database.read() as transaction:
        [(webhook, attempts)] = queries.timeline(transaction, job.id).webhooks
    assert (webhook.type, webhook.url, list(attempts)) == ("job.succeeded", HOOK, [])
    assert (webhook.next_attempt_at, webhook.delivered_at, webhook.attempt) == (clock.now, None, 0)
    assert webhook.snapshot["id"] == str(job.id)
    assert webhook.snapshot["status"] == "succeeded"
    assert webhook.snapshot["metadata"] == {"order": 7}
    assert sorted(output["index"] for output in webhook.snapshot["outputs"]) == [0, 1]


def test_a_job_without_a_webhook_url_has_no_webhook_events(database: Database, clock: Clock) -> None:
    assert webhook_types(database, job_in(State.SUCCEEDED, database, clock).id) == []


def test_a_rolled_back_success_leaves_the_job_running(database: Database) -> None:
    job = submit(database, webhook_url=HOOK)
    lease = claim(database)
    before = row(fetch(database, job.id))
    with pytest.raises(ZeroDivisionError), database.write() as transaction:
        lifecycle.complete(transaction, lease, [stored_image()], {}, {}, RETENTION_S)
        raise ZeroDivisionError
    assert row(fetch(database, job.id)) == before
    assert fetch(database, job.id).outputs == []
    assert (events(database, job.id), webhook_types(database, job.id)) == (["queued", "claimed"], [])
    assert complete(database, lease) is not None


def test_a_success_whose_outputs_cannot_be_stored_is_rolled_back(database: Database) -> None:
    job = submit(database, webhook_url=HOOK)
    lease = claim(database)
    with pytest.raises(IntegrityError):
        complete(database, lease, [stored_image(0), stored_image(0)])
    assert fetch(database, job.id).status == State.RUNNING
    assert (events(database, job.id), webhook_types(database, job.id)) == (["queued", "claimed"], [])


def test_a_job_succeeds_only_once(database: Database) -> None:
    job = submit(database, webhook_url=HOOK)
    lease = claim(database)
    assert complete(database, lease) is not None
    assert complete(database, lease) is None
    assert fail(database, lease) is None
    assert webhook_types(database, job.id) == ["job.succeeded"]


def test_a_success_counts_after_a_cancellation_request(database: Database) -> None:
    job = submit(database)
    lease = claim(database)
    cancel(database, job.id)
    complete(database, lease)
    assert fetch(database, job.id).status == State.SUCCEEDED


def test_a_permanent_error_ends_the_job_with_attempts_left(database: Database, clock: Clock) -> None:
    job = submit(database, max_attempts=3, webhook_url=HOOK)
    fail(database, claim(database), PERMANENT)
    failed = fetch(database, job.id)
    assert (failed.status, failed.completed_at, failed.attempt) == (State.FAILED, clock.now, 1)
    assert (failed.error_code, failed.error_message) == (PERMANENT.code, PERMANENT.message)
    assert failed.error_retryable is False
    assert (failed.lease_token, failed.lease_until, failed.expires_at) == (None, None, None)
    assert events(database, job.id) == ["queued", "claimed", "failed"]
    assert webhook_types(database, job.id) == ["job.failed"]


def test_a_retryable_error_is_retried_until_no_attempts_are_left(database: Database, clock: Clock) -> None:
    job = submit(database, max_attempts=3, webhook_url=HOOK)
    for delay_s in (RETRY_DELAY_S, RETRY_DELAY_S * 2):
        fail(database, claim(database), TRANSIENT)
        scheduled = fetch(database, job.id)
        assert (scheduled.status, scheduled.error_code, scheduled.notified_at) == (State.QUEUED, None, None)
        assert scheduled.available_at == clock.now + timedelta(seconds=delay_s)
        assert webhook_types(database, job.id) == []
        clock.advance(delay_s)
    fail(database, claim(database), TRANSIENT)
    failed = fetch(database, job.id)
    assert (failed.status, failed.attempt, failed.attempts_left) == (State.FAILED, 3, 0)
    assert (failed.error_code, failed.error_retryable) == (TRANSIENT.code, True)
    assert events(database, job.id) == ["queued", *["claimed", "retry_scheduled"] * 2, "claimed", "failed"]
    assert webhook_types(database, job.id) == ["job.failed"]


def test_the_retry_delay_is_limited(database: Database, clock: Clock) -> None:
    job = submit(database, max_attempts=100)
    with database.write() as transaction:
        transaction.session.execute(update(QueueEntry).values(attempt=98).execution_options(synchronize_session=False))
    fail(database, claim(database), TRANSIENT)
    assert timedelta(minutes=10) < fetch(database, job.id).available_at - clock.now < timedelta(hours=1)


@pytest.mark.parametrize("failure", [TRANSIENT, PERMANENT])
def test_an_error_after_a_cancellation_request_cancels_the_job(database: Database, failure: lifecycle.Failure) -> None:
    job = submit(database, webhook_url=HOOK)
    lease = claim(database)
    cancel(database, job.id)
    fail(database, lease, failure)
    canceled = fetch(database, job.id)
    assert (canceled.status, canceled.error_code) == (State.CANCELED, None)
    assert webhook_types(database, job.id) == ["job.canceled"]


def test_a_released_job_is_queued_without_counting_the_attempt(database: Database) -> None:
    job = submit(database, max_attempts=1)
    for attempt in (1, 2, 3):
        lease = claim(database)
        release(database, lease)
        returned = fetch(database, job.id)
        assert (returned.status, returned.attempts_left, returned.notified_at) == (State.QUEUED, 1, None)
        assert returned.attempt == attempt  # the number is not reused: objects are named by it
        assert complete(database, lease) is None
    assert complete(database, claim(database)) is not None
    assert events(database, job.id) == ["queued", *["claimed", "released"] * 3, "claimed", "succeeded"]


def test_a_job_released_after_a_cancellation_request_is_canceled(database: Database) -> None:
    job = submit(database, webhook_url=HOOK)
    lease = claim(database)
    cancel(database, job.id)
    release(database, lease)
    assert fetch(database, job.id).status == State.CANCELED
    assert webhook_types(database, job.id) == ["job.canceled"]


@pytest.mark.parametrize("ending", [release, fail])
def test_a_cancellation_request_during_the_end_of_an_attempt_is_not_lost(postgresql: Database, ending: Any) -> None:
    """The request arrives between the first statement of the end and its commit."""
    job = submit(postgresql)
    lease = claim(postgresql)
    requests: list[Any] = []
    with ThreadPoolExecutor(1) as pool:

        @event.listens_for(postgresql.engine, "after_cursor_execute")
        def request_once(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            if not requests and "BEGIN" not in statement:
                requests.append(None)
                requests[0] = pool.submit(cancel, postgresql, job.id)
                wait_until_blocked(postgresql)

        ending(postgresql, lease)
        event.remove(postgresql.engine, "after_cursor_execute", request_once)
        requests[0].result(30)
    assert fetch(postgresql, job.id).status == State.CANCELED


def test_a_lost_workers_job_returns_to_the_queue(database: Database, clock: Clock) -> None:
    job = submit(database, max_attempts=1, webhook_url=HOOK)
    lost = claim(database, "worker-1")
    with database.write() as transaction:
        claims.heartbeat(transaction, lost, LEASE_S, ("denoising", 5, 8))
    clock.advance(LEASE_S)
    assert rescue(database) == []  # the lease is still valid at its last moment
    clock.advance(0.001)
    assert [rescued.id for rescued in rescue(database)] == [job.id]
    assert rescue(database) == []
    waiting = fetch(database, job.id)
    assert (waiting.status, waiting.attempts_left, waiting.notified_at) == (State.QUEUED, 1, None)
    assert (waiting.progress_phase, waiting.progress_step, waiting.isolated) == (None, 0, True)
    assert webhook_types(database, job.id) == []
    assert complete(database, claim(database, "worker-2")) is not None
    assert events(database, job.id) == ["queued", "claimed", "rescued", "claimed", "succeeded"]


def lose_worker(database: Database, clock: Clock) -> Job:
    """Claim the next job and lose the worker; return the job after its rescue."""
    claim(database)
    clock.advance(LEASE_S + 1)
    [rescued] = rescue(database)
    return rescued


def test_a_lost_worker_is_not_the_fault_of_a_job_that_did_not_run_alone(database: Database, clock: Clock) -> None:
    submit(database, max_attempts=1)
    first = lose_worker(database, clock)
    assert (first.status, first.isolated, first.attempts_left) == (State.QUEUED, True, 1)
    assert complete(database, claim(database)) is not None


def test_a_job_that_loses_its_worker_while_it_runs_alone_fails_as_poison(database: Database, clock: Clock) -> None:
    job = submit(database, max_attempts=2, webhook_url=HOOK)
    lost = [lose_worker(database, clock) for _ in range(3)]
    assert [(one.status, one.isolated, one.attempts_left) for one in lost] == [
        (State.QUEUED, True, 2),
        (State.QUEUED, True, 1),
        (State.FAILED, False, 0),
    ]
    failed = fetch(database, job.id)
    assert (failed.status, failed.error_code, failed.error_retryable) == (State.FAILED, "poison", False)
    assert (failed.attempt, failed.worker) == (3, "worker-1")
    assert webhook_types(database, job.id) == ["job.failed"]
    with database.write() as transaction:
        assert lifecycle.retry(transaction, job.id, 2).isolated, "it still runs alone after an explicit retry"


def test_a_worker_lost_during_an_outage_of_the_database_proves_nothing(database: Database, clock: Clock) -> None:
    job = submit(database, max_attempts=1)
    for isolated in (False, True):
        claim(database)
        clock.advance(LEASE_S + 1)
        [excused] = rescue(database, excused=True)
        assert (excused.status, excused.isolated, excused.attempts_left) == (State.QUEUED, isolated, 1)
        if not isolated:
            lose_worker(database, clock)
    with database.write() as transaction:
        begun = update(QueueEntry).values(attempt=lifecycle.MAX_ATTEMPTS_BEGUN - 1)
        transaction.session.execute(begun.execution_options(synchronize_session=False))
    claim(database)
    clock.advance(LEASE_S + 1)
    rescue(database, excused=True)
    assert fetch(database, job.id).error_code == "poison", "no job is tried for ever"


def test_an_isolated_job_stays_isolated_until_it_ends(database: Database, clock: Clock) -> None:
    job = submit(database)
    lose_worker(database, clock)
    release(database, claim(database))
    fail(database, claim(database), TRANSIENT)
    assert fetch(database, job.id).isolated
    clock.advance(3600)
    fail(database, claim(database), PERMANENT)
    with database.write() as transaction:
        assert not lifecycle.retry(transaction, job.id, 2).isolated


def test_a_failure_that_is_not_charged_costs_no_attempt(database: Database, clock: Clock) -> None:
    job = submit(database, max_attempts=1)
    away = lifecycle.Failure("storage_unavailable", "away", retryable=True, charged=False)
    for attempt in (1, 2, 3):
        fail(database, claim(database), away)
        waiting = fetch(database, job.id)
        assert (waiting.status, waiting.attempt, waiting.attempts_left) == (State.QUEUED, attempt, 1)
        clock.advance(3600)
    fail(database, claim(database), TRANSIENT)
    assert fetch(database, job.id).status == State.FAILED


def test_no_job_is_tried_for_ever(database: Database) -> None:
    job = submit(database, max_attempts=1)
    with database.write() as transaction:
        begun = update(QueueEntry).values(attempt=lifecycle.MAX_ATTEMPTS_BEGUN - 1)
        transaction.session.execute(begun.execution_options(synchronize_session=False))
    fail(database, claim(database), lifecycle.Failure("storage_unavailable", "away", retryable=True, charged=False))
    assert fetch(database, job.id).status == State.FAILED


def test_a_lost_worker_after_a_cancellation_request_leaves_a_canceled_job(database: Database, clock: Clock) -> None:
    job = submit(database, max_attempts=1, webhook_url=HOOK)
    claim(database)
    cancel(database, job.id)
    clock.advance(LEASE_S + 1)
    rescue(database)
    assert fetch(database, job.id).status == State.CANCELED
    assert webhook_types(database, job.id) == ["job.canceled"]


def test_one_rescue_handles_many_jobs_and_skips_valid_leases(database: Database, clock: Clock) -> None:
    lost = [submit(database) for _ in range(6)]
    for _ in lost:
        claim(database)
    for job in lost[::2]:
        cancel(database, job.id)
    clock.advance(LEASE_S + 1)
    alive = submit(database)
    claim(database)
    assert {job.id for job in rescue(database)} == {job.id for job in lost}
    assert [fetch(database, job.id).status for job in lost] == [State.CANCELED, State.QUEUED] * 3
    assert fetch(database, alive.id).status == State.RUNNING


def test_a_rescue_does_not_wait_for_a_heartbeat_in_progress(postgresql: Database, clock: Clock) -> None:
    submit(postgresql)
    lease = claim(postgresql)
    clock.advance(LEASE_S + 1)
    with ThreadPoolExecutor(1) as pool, postgresql.write() as transaction:
        assert claims.heartbeat(transaction, lease, LEASE_S) is not None
        assert pool.submit(rescue, postgresql).result(10) == []
    assert rescue(postgresql) == []
    assert complete(postgresql, lease) is not None
