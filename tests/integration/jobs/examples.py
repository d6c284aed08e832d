"""Jobs for tests to look at: one call per state, each in transactions of its own, as the processes make them."""

import uuid
from collections.abc import Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import select

from tests.waiting import wait_until
from zcore.jobs import lifecycle, queries
from zcore.jobs.database import Database
from zcore.jobs.lifecycle import Failure, Lease, StoredOutput
from zcore.jobs.models import Job
from zcore.jobs.states import State
from zcore.request import GenerationDefaults, RequestLimits, Submission, parse_submission
from zcore.stages import Stage

LEASE_S = 30.0
RETENTION_S = 600.0
RETRY_DELAY_S = 2.0
HOOK = "https://caller.example/told"

SLIP = Failure("storage_unavailable", "the bucket did not answer", retryable=True)
LOST = Failure("embedding_lost", "it is no longer in storage", retryable=True)
DEFECT = Failure("model_unavailable", "a file of the checkpoint is missing", retryable=False)


class Clock:
    """A time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = datetime(2031, 5, 4, 12, 0, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += timedelta(seconds=seconds)


def submission(**fields: Any) -> Submission:
    """A valid one, changed by `fields`."""
    return parse_submission({"prompt": "a fox in snow", **fields}, GenerationDefaults(), RequestLimits())


def submit(
    database: Database, owner: str = "anna", max_attempts: int = 3, stage: Stage = Stage.GENERATE, **fields: Any
) -> Job:
    """A queued job."""
    with database.write() as transaction:
        return lifecycle.submit(transaction, submission(**fields), owner, "0" * 64, max_attempts, stage=stage).job


def claim(database: Database, worker: str = "worker-1", stages: Collection[Stage] = tuple(Stage)) -> Lease:
    """The lease of the next best job, which has to be there."""
    with database.write() as transaction:
        job = lifecycle.claim(transaction, worker, LEASE_S, stages)
    assert job is not None, "there was nothing to claim"
    return lifecycle.lease_of(job)


def picture(position: int = 0) -> StoredOutput:
    """One stored picture."""
    return StoredOutput(position, f"jobs/x/1/{position}.png", "png", 1024, 1024, 123_456, "a" * 64, 7 + position)


def complete(database: Database, lease: Lease, outputs: Sequence[StoredOutput] | None = None) -> Job | None:
    """The lease's job with its pictures (one where not said); None when the lease is lost."""
    pictures = [picture()] if outputs is None else list(outputs)
    with database.write() as transaction:
        return lifecycle.complete(transaction, lease, pictures, {"total_ms": 5}, {"device": "cpu"}, RETENTION_S)


def fail(database: Database, lease: Lease, failure: Failure = SLIP) -> Job | None:
    """The lease's job after a failed attempt; None when the lease is lost."""
    with database.write() as transaction:
        return lifecycle.fail(transaction, lease, failure, RETRY_DELAY_S)


def pass_on(database: Database, lease: Lease) -> Job | None:
    """The lease's job after its prompt was encoded; None when the lease is lost."""
    with database.write() as transaction:
        return lifecycle.pass_on(transaction, lease, {"encode_ms": 7}, {"encoder": "cpu"})


def reencode(database: Database, lease: Lease) -> Job | None:
    """The lease's job after its embedding was not found; None when the lease is lost."""
    with database.write() as transaction:
        return lifecycle.reencode(transaction, lease, LOST)


def cancel(database: Database, job_id: uuid.UUID) -> Job:
    """The job after a wish to cancel."""
    with database.write() as transaction:
        return lifecycle.cancel(transaction, job_id)


def rescue(database: Database) -> list[Job]:
    """What the clock work did about lost leases."""
    with database.write() as transaction:
        return lifecycle.rescue(transaction)


def job_in(state: State, database: Database, clock: Clock, **fields: Any) -> Job:
    """A job that came to `state` the ordinary way."""
    job = submit(database, **fields)
    match state:
        case State.QUEUED:
            pass
        case State.RUNNING:
            claim(database)
        case State.SUCCEEDED:
            complete(database, claim(database))
        case State.FAILED:
            fail(database, claim(database), DEFECT)
        case State.CANCELED:
            cancel(database, job.id)
        case State.EXPIRED:
            complete(database, claim(database))
            clock.advance(RETENTION_S)
            with database.write() as transaction:
                lifecycle.expire(transaction, job.id)
    found = look(database, job.id)
    assert found.status == state
    return found


def look(database: Database, job_id: uuid.UUID) -> Job:
    """The row as it stands now."""
    with database.read() as transaction:
        return queries.get(transaction, job_id)


def events(database: Database, job_id: uuid.UUID) -> list[str]:
    """The timeline's event types, oldest first."""
    with database.read() as transaction:
        return [event.type for event in queries.timeline(transaction, job_id).events]


def told(database: Database, job_id: uuid.UUID) -> list[str]:
    """What the caller's webhook has to be told of this job, oldest first."""
    with database.read() as transaction:
        return [webhook.type for webhook, _ in queries.timeline(transaction, job_id).webhooks]


def all_jobs(database: Database) -> Sequence[Job]:
    """Every row, oldest first."""
    with database.read() as transaction:
        return transaction.session.scalars(select(Job).order_by(Job.id)).all()


def row(job: Job) -> dict[str, Any]:
    """Every column, to compare a row with itself at another time."""
    return {column.key: getattr(job, column.key) for column in Job.__mapper__.column_attrs}


def wait_until_blocked(database: Database) -> None:
    """Until another connection to this PostgreSQL database waits for a lock."""

    def is_blocked() -> bool:
        with database.engine.connect() as connection:
            waiting = connection.exec_driver_sql(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
            ).scalar()
        return bool(waiting)

    wait_until(is_blocked)
