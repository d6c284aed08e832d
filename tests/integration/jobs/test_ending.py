"""How an attempt ends: with pictures, with an error, handed back, or with its worker lost."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, update
from sqlalchemy.exc import IntegrityError

from tests.integration.jobs.examples import (
    DEFECT,
    HOOK,
    LEASE_S,
    RETENTION_S,
    RETRY_DELAY_S,
    SLIP,
    Clock,
    cancel,
    claim,
    complete,
    events,
    fail,
    job_in,
    look,
    picture,
    rescue,
    row,
    submit,
    told,
    wait_until_blocked,
)
from zcore.jobs import lifecycle, queries
from zcore.jobs.database import Database
from zcore.jobs.lifecycle import Lease
from zcore.jobs.models import Job
from zcore.jobs.states import State


def hand_back(database: Database, lease: Lease) -> Job | None:
    with database.write() as transaction:
        return lifecycle.hand_back(transaction, lease)


def test_success_stores_pictures_event_and_webhook_together(database: Database, clock: Clock) -> None:
    job = submit(database, webhook_url=HOOK, metadata={"order": 7}, n=2)
    lease = claim(database)
    clock.advance(4)
    returned = complete(database, lease, [picture(1), picture(0)])
    assert returned is not None
    stored = look(database, job.id)
    assert (stored.status, stored.completed_at) == (State.SUCCEEDED, clock.now)
    assert stored.expires_at == clock.now + timedelta(seconds=RETENTION_S)
    assert (stored.lease_token, stored.lease_until) == (None, None)
    assert (stored.metrics, stored.engine) == ({"total_ms": 5}, {"device": "cpu"})
    assert [(output.position, output.seed) for output in stored.outputs] == [(0, 7), (1, 8)]
    assert events(database, job.id) == ["queued", "claimed", "succeeded"]
    with database.read() as transaction:
        [(webhook, tries)] = queries.timeline(transaction, job.id).webhooks
    assert (webhook.type, webhook.url, list(tries)) == ("job.succeeded", HOOK, [])
    assert (webhook.next_attempt_at, webhook.delivered_at, webhook.attempt) == (clock.now, None, 0)
    assert webhook.snapshot["id"] == str(job.id)
    assert webhook.snapshot["status"] == "succeeded"
    assert webhook.snapshot["metadata"] == {"order": 7}
    assert sorted(output["index"] for output in webhook.snapshot["outputs"]) == [0, 1]


def test_without_a_webhook_address_nobody_is_told(database: Database, clock: Clock) -> None:
    assert told(database, job_in(State.SUCCEEDED, database, clock).id) == []


def test_a_rolled_back_success_leaves_the_job_running(database: Database) -> None:
    job = submit(database, webhook_url=HOOK)
    lease = claim(database)
    before = row(look(database, job.id))
    with pytest.raises(ZeroDivisionError), database.write() as transaction:
        lifecycle.complete(transaction, lease, [picture()], {}, {}, RETENTION_S)
        raise ZeroDivisionError
    assert row(look(database, job.id)) == before
    assert look(database, job.id).outputs == []
    assert (events(database, job.id), told(database, job.id)) == (["queued", "claimed"], [])
    assert complete(database, lease) is not None


def test_pictures_that_cannot_be_stored_leave_no_success(database: Database) -> None:
    job = submit(database, webhook_url=HOOK)
    lease = claim(database)
    with pytest.raises(IntegrityError):
        complete(database, lease, [picture(0), picture(0)])
    assert look(database, job.id).status == State.RUNNING
    assert (events(database, job.id), told(database, job.id)) == (["queued", "claimed"], [])


def test_a_job_succeeds_once_however_often_its_worker_says_so(database: Database) -> None:
    job = submit(database, webhook_url=HOOK)
    lease = claim(database)
    assert complete(database, lease) is not None
    assert complete(database, lease) is None
    assert fail(database, lease) is None
    assert told(database, job.id) == ["job.succeeded"]


def test_a_success_counts_though_the_caller_wished_to_cancel_meanwhile(database: Database) -> None:
    job = submit(database)
    lease = claim(database)
    cancel(database, job.id)
    complete(database, lease)
    assert look(database, job.id).status == State.SUCCEEDED


def test_a_final_error_ends_the_job_with_attempts_left(database: Database, clock: Clock) -> None:
    job = submit(database, max_attempts=3, webhook_url=HOOK)
    fail(database, claim(database), DEFECT)
    failed = look(database, job.id)
    assert (failed.status, failed.completed_at, failed.attempts_left) == (State.FAILED, clock.now, 2)
    assert (failed.error_code, failed.error_message, failed.error_retryable) == (DEFECT.code, DEFECT.message, False)
    assert (failed.lease_token, failed.lease_until, failed.expires_at) == (None, None, None)
    assert events(database, job.id) == ["queued", "claimed", "failed"]
    assert told(database, job.id) == ["job.failed"]


def test_a_retryable_error_is_tried_again_until_the_attempts_are_spent(database: Database, clock: Clock) -> None:
    job = submit(database, max_attempts=3, webhook_url=HOOK)
    for delay_s in (RETRY_DELAY_S, RETRY_DELAY_S * 2):
        fail(database, claim(database), SLIP)
        postponed = look(database, job.id)
        assert (postponed.status, postponed.error_code, postponed.announced_at) == (State.QUEUED, None, None)
        assert postponed.available_at == clock.now + timedelta(seconds=delay_s)
        assert told(database, job.id) == []
        clock.advance(delay_s)
    fail(database, claim(database), SLIP)
    failed = look(database, job.id)
    assert (failed.status, failed.attempt, failed.attempts_left) == (State.FAILED, 3, 0)
    assert (failed.error_code, failed.error_retryable) == (SLIP.code, True)
    assert events(database, job.id) == ["queued", *["claimed", "postponed"] * 2, "claimed", "failed"]
    assert told(database, job.id) == ["job.failed"]


def test_the_delay_stops_growing_so_that_a_hundredth_attempt_has_a_date(database: Database, clock: Clock) -> None:
    job = submit(database, max_attempts=100)
    with database.write() as transaction:
        transaction.session.execute(update(Job).values(attempt=98))
    fail(database, claim(database), SLIP)
    assert timedelta(minutes=10) < look(database, job.id).available_at - clock.now < timedelta(hours=1)


@pytest.mark.parametrize("failure", [SLIP, DEFECT])
def test_an_error_after_the_wish_to_cancel_is_a_cancellation(database: Database, failure: lifecycle.Failure) -> None:
    job = submit(database, webhook_url=HOOK)
    lease = claim(database)
    cancel(database, job.id)
    fail(database, lease, failure)
    canceled = look(database, job.id)
    assert (canceled.status, canceled.error_code) == (State.CANCELED, None)
    assert told(database, job.id) == ["job.canceled"]


def test_a_job_handed_back_waits_for_the_next_worker_with_its_attempt_uncounted(database: Database) -> None:
    job = submit(database, max_attempts=1)
    for attempt in (1, 2, 3):
        lease = claim(database)
        hand_back(database, lease)
        returned = look(database, job.id)
        assert (returned.status, returned.attempts_left, returned.announced_at) == (State.QUEUED, 1, None)
        assert returned.attempt == attempt  # its number is used up all the same: objects are named by it
        assert complete(database, lease) is None
    assert complete(database, claim(database)) is not None
    assert events(database, job.id) == ["queued", *["claimed", "handed_back"] * 3, "claimed", "succeeded"]


def test_a_job_handed_back_after_the_wish_to_cancel_is_canceled(database: Database) -> None:
    job = submit(database, webhook_url=HOOK)
    lease = claim(database)
    cancel(database, job.id)
    hand_back(database, lease)
    assert look(database, job.id).status == State.CANCELED
    assert told(database, job.id) == ["job.canceled"]


@pytest.mark.parametrize("ending", [hand_back, fail])
def test_a_wish_to_cancel_is_never_overtaken_by_the_end_of_the_attempt(postgresql: Database, ending: Any) -> None:
    """The wish arrives between the first statement of the ending and its commit."""
    job = submit(postgresql)
    lease = claim(postgresql)
    wishes: list[Any] = []
    with ThreadPoolExecutor(1) as pool:

        @event.listens_for(postgresql.engine, "after_cursor_execute")
        def wish_once(*_: Any) -> None:
            if not wishes:
                wishes.append(None)
                wishes[0] = pool.submit(cancel, postgresql, job.id)
                wait_until_blocked(postgresql)

        ending(postgresql, lease)
        event.remove(postgresql.engine, "after_cursor_execute", wish_once)
        wishes[0].result(30)
    assert look(postgresql, job.id).status == State.CANCELED


def test_a_lost_workers_job_returns_to_the_queue(database: Database, clock: Clock) -> None:
    job = submit(database, max_attempts=2, webhook_url=HOOK)
    lost = claim(database, "worker-1")
    with database.write() as transaction:
        lifecycle.heartbeat(transaction, lost, LEASE_S, ("denoising", 5, 8))
    clock.advance(LEASE_S)
    assert rescue(database) == []  # to the last moment it is the worker's
    clock.advance(0.001)
    assert [rescued.id for rescued in rescue(database)] == [job.id]
    assert rescue(database) == []
    waiting = look(database, job.id)
    assert (waiting.status, waiting.attempts_left, waiting.announced_at) == (State.QUEUED, 1, None)
    assert (waiting.progress_phase, waiting.progress_step) == (None, 0)
    assert told(database, job.id) == []
    assert complete(database, claim(database, "worker-2")) is not None
    assert events(database, job.id) == ["queued", "claimed", "rescued", "claimed", "succeeded"]


def test_a_job_whose_last_worker_is_lost_fails(database: Database, clock: Clock) -> None:
    job = submit(database, max_attempts=1, webhook_url=HOOK)
    lost = claim(database)
    clock.advance(LEASE_S + 1)
    rescue(database)
    failed = look(database, job.id)
    assert (failed.status, failed.error_code, failed.error_retryable) == (State.FAILED, "worker_lost", True)
    assert told(database, job.id) == ["job.failed"]
    assert complete(database, lost) is None


def test_a_lost_worker_that_should_have_stopped_leaves_a_canceled_job(database: Database, clock: Clock) -> None:
    job = submit(database, max_attempts=1, webhook_url=HOOK)
    claim(database)
    cancel(database, job.id)
    clock.advance(LEASE_S + 1)
    rescue(database)
    assert look(database, job.id).status == State.CANCELED
    assert told(database, job.id) == ["job.canceled"]


def test_one_rescue_sees_to_many_jobs_and_leaves_the_living(database: Database, clock: Clock) -> None:
    lost = [submit(database, max_attempts=1 + index % 2) for index in range(6)]
    for _ in lost:
        claim(database)
    clock.advance(LEASE_S + 1)
    alive = submit(database)
    claim(database)
    assert {job.id for job in rescue(database)} == {job.id for job in lost}
    assert [look(database, job.id).status for job in lost] == [State.FAILED, State.QUEUED] * 3
    assert look(database, alive.id).status == State.RUNNING


def test_a_rescue_does_not_wait_for_a_heartbeat_in_progress(postgresql: Database, clock: Clock) -> None:
    submit(postgresql)
    lease = claim(postgresql)
    clock.advance(LEASE_S + 1)
    with ThreadPoolExecutor(1) as pool, postgresql.write() as transaction:
        assert lifecycle.heartbeat(transaction, lease, LEASE_S) is not None
        assert pool.submit(rescue, postgresql).result(10) == []
    assert rescue(postgresql) == []
    assert complete(postgresql, lease) is not None
