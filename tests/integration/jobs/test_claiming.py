"""Each job is claimed by exactly one worker, which holds it while its heartbeats renew the lease."""

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from tests.integration.jobs.examples import (
    LEASE_S,
    RETRY_DELAY_S,
    TRANSIENT,
    Clock,
    all_jobs,
    claim,
    complete,
    events,
    fail,
    fetch,
    rescue,
    row,
    submit,
)
from zcore.jobs import claims, lifecycle
from zcore.jobs.claims import Lease, LeaseRenewal
from zcore.jobs.database import Database
from zcore.jobs.states import State


def test_claiming_from_an_empty_queue_returns_none(database: Database) -> None:
    with database.write() as transaction:
        assert claims.claim(transaction, "worker-1", LEASE_S) is None


def test_a_claimed_job_runs_under_a_lease(database: Database, clock: Clock) -> None:
    submitted = submit(database, max_attempts=3)
    clock.advance(5)
    lease = claim(database, "worker-7")
    job = fetch(database, submitted.id)
    assert (job.status, job.worker, job.lease_token) == (State.RUNNING, "worker-7", lease.token)
    assert (job.attempt, job.attempts_left) == (1, 2)
    assert job.started_at == clock.now
    assert job.lease_until == clock.now + timedelta(seconds=LEASE_S)
    assert events(database, job.id) == ["queued", "claimed"]


def test_higher_priority_is_claimed_first_and_then_the_oldest(database: Database) -> None:
    priorities = [0, -10, 3, 0, 10, 3]
    jobs = [submit(database, priority=priority) for priority in priorities]
    order = [claim(database).job_id for _ in jobs]
    assert order == [jobs[index].id for index in (4, 2, 5, 0, 3, 1)]


def test_a_job_that_waits_for_its_retry_does_not_block_others(database: Database, clock: Clock) -> None:
    failed, other = submit(database, priority=9), submit(database)
    fail(database, claim(database), TRANSIENT)
    assert claim(database).job_id == other.id
    clock.advance(RETRY_DELAY_S - 0.001)
    with database.write() as transaction:
        assert claims.claim(transaction, "worker-1", LEASE_S) is None
    clock.advance(0.001)
    assert claim(database).job_id == failed.id


@pytest.mark.timeout(120)
def test_eight_threads_claim_fifty_jobs_each_exactly_once(database: Database) -> None:
    jobs = {submit(database).id for _ in range(50)}
    barrier = threading.Barrier(8)  # as many as the pool has connections

    def drain(number: int) -> list[uuid.UUID]:
        barrier.wait()
        taken: list[uuid.UUID] = []
        while True:
            with database.write() as transaction:
                job = claims.claim(transaction, f"worker-{number}", LEASE_S)
            if job is None:
                return taken
            taken.append(job.id)

    with ThreadPoolExecutor(8) as pool:
        taken = [job_id for part in pool.map(drain, range(8)) for job_id in part]
    assert sorted(taken) == sorted(jobs)
    assert {(job.status, job.attempt) for job in all_jobs(database)} == {("running", 1)}
    assert all(events(database, job_id) == ["queued", "claimed"] for job_id in jobs)


def test_a_second_worker_skips_a_job_that_is_being_claimed(postgresql: Database) -> None:
    best, next_best = submit(postgresql, priority=1), submit(postgresql)
    with ThreadPoolExecutor(1) as pool, postgresql.write() as transaction:
        first = claims.claim(transaction, "worker-1", LEASE_S)
        assert first is not None
        assert first.id == best.id
        # Does not wait for the open transaction.
        assert pool.submit(claim, postgresql, "worker-2").result(10).job_id == next_best.id


def test_a_rolled_back_claim_leaves_the_job_queued(database: Database) -> None:
    job = submit(database)
    before = row(fetch(database, job.id))
    with pytest.raises(ZeroDivisionError), database.write() as transaction:
        claims.claim(transaction, "worker-1", LEASE_S)
        raise ZeroDivisionError
    assert row(fetch(database, job.id)) == before
    assert events(database, job.id) == ["queued"]


def test_a_heartbeat_renews_the_lease_and_stores_progress(database: Database, clock: Clock) -> None:
    submit(database)
    lease = claim(database)
    clock.advance(LEASE_S - 1)
    with database.write() as transaction:
        assert claims.heartbeat(transaction, lease, LEASE_S, ("denoising", 3, 8)) == LeaseRenewal(
            cancel_requested=False
        )
    job = fetch(database, lease.job_id)
    assert job.lease_until == clock.now + timedelta(seconds=LEASE_S)
    assert (job.progress_phase, job.progress_step, job.progress_steps) == ("denoising", 3, 8)
    clock.advance(LEASE_S)
    assert rescue(database) == []
    with database.write() as transaction:
        claims.heartbeat(transaction, lease, LEASE_S)
    assert fetch(database, lease.job_id).progress_step == 3


def test_a_heartbeat_reports_the_cancellation_request(database: Database) -> None:
    submit(database)
    lease = claim(database)
    with database.write() as transaction:
        lifecycle.cancel(transaction, lease.job_id)
    with database.write() as transaction:
        assert claims.heartbeat(transaction, lease, LEASE_S) == LeaseRenewal(cancel_requested=True)


def test_a_late_heartbeat_before_the_rescue_renews_the_lease(database: Database, clock: Clock) -> None:
    submit(database)
    lease = claim(database)
    clock.advance(LEASE_S * 3)
    with database.write() as transaction:
        assert claims.heartbeat(transaction, lease, LEASE_S) is not None
    assert rescue(database) == []
    assert complete(database, lease) is not None


@pytest.mark.parametrize("taken_over", [False, True], ids=["back in the queue", "taken over"])
def test_a_lost_lease_cannot_write(database: Database, clock: Clock, taken_over: bool) -> None:
    job = submit(database, webhook_url="https://caller.example/hook")
    lost = claim(database, "worker-1")
    clock.advance(LEASE_S + 1)
    assert [rescued.id for rescued in rescue(database)] == [job.id]
    if taken_over:
        claim(database, "worker-2")
    before, events_before = row(fetch(database, job.id)), events(database, job.id)
    with database.write() as transaction:
        assert claims.heartbeat(transaction, lost, LEASE_S, ("denoising", 7, 8)) is None
    assert complete(database, lost) is None
    assert fail(database, lost) is None
    with database.write() as transaction:
        assert lifecycle.release(transaction, lost) is None
        assert lifecycle.acknowledge_cancel(transaction, lost) is None
    assert row(fetch(database, job.id)) == before
    assert events(database, job.id) == events_before
    assert fetch(database, job.id).outputs == []


def test_a_token_is_valid_only_for_its_own_job(database: Database) -> None:
    first, second = submit(database), submit(database)
    token = claim(database).token
    claim(database)
    assert complete(database, Lease(second.id, token)) is None
    assert fetch(database, first.id).status == fetch(database, second.id).status == State.RUNNING
