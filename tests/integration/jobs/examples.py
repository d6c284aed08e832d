"""Example jobs: one helper for each change, in a separate transaction, as the processes make it."""

import uuid
from collections.abc import Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import delete, select, update

from tests.waiting import wait_until
from zcore.jobs import claims, lifecycle, queries, recovery
from zcore.jobs.claims import Lease
from zcore.jobs.database import Database
from zcore.jobs.lifecycle import Failure, StoredOutput
from zcore.jobs.models import ONLY_ON, SEARCH_INDEX, Job, QueueEntry, QueueMark, Table
from zcore.jobs.states import State
from zcore.request import GenerationDefaults, RequestLimits, Submission, parse_submission
from zcore.stages import Stage

LEASE_S = 30.0
RETENTION_S = 600.0
RETRY_DELAY_S = 2.0
HOOK = "https://caller.example/hook"

TRANSIENT = Failure("storage_unavailable", "the bucket did not answer", retryable=True)
LOST = Failure("embedding_lost", "it is no longer in storage", retryable=True)
PERMANENT = Failure("model_unavailable", "a file of the checkpoint is missing", retryable=False)


class Clock:
    """Clock that stands still until it is advanced."""

    def __init__(self) -> None:
        self.now = datetime(2031, 5, 4, 12, 0, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        """Move the time forward."""
        self.now += timedelta(seconds=seconds)


def submission(**fields: Any) -> Submission:
    """Return a valid submission with these fields changed."""
    return parse_submission({"prompt": "a fox in snow", **fields}, GenerationDefaults(), RequestLimits())


def submit(
    database: Database, owner: str = "anna", max_attempts: int = 3, stage: Stage = Stage.GENERATE, **fields: Any
) -> Job:
    """Submit a job and return it."""
    with database.write() as transaction:
        return lifecycle.submit(transaction, submission(**fields), owner, "0" * 64, max_attempts, stage=stage).job


def claim(database: Database, worker: str = "worker-1", stages: Collection[Stage] = tuple(Stage)) -> Lease:
    """Claim the next job, which must exist, and return its lease."""
    with database.write() as transaction:
        job = claims.claim(transaction, worker, LEASE_S, stages)
    assert job is not None, "there was nothing to claim"
    return claims.lease_of(job)


def stored_image(position: int = 0) -> StoredOutput:
    """Return a stored image."""
    return StoredOutput(position, f"jobs/x/1/{position}.png", "png", 1024, 1024, 123_456, "a" * 64, 7 + position)


def complete(database: Database, lease: Lease, outputs: Sequence[StoredOutput] | None = None) -> Job | None:
    """Complete the job with these images, by default one; None if the lease is lost."""
    images = [stored_image()] if outputs is None else list(outputs)
    with database.write() as transaction:
        return lifecycle.complete(transaction, lease, images, {"total_ms": 5}, {"device": "cpu"}, RETENTION_S)


def fail(database: Database, lease: Lease, failure: Failure = TRANSIENT) -> Job | None:
    """End the attempt with a failure; None if the lease is lost."""
    with database.write() as transaction:
        return lifecycle.fail(transaction, lease, failure, RETRY_DELAY_S)


def complete_encoding(database: Database, lease: Lease) -> Job | None:
    """Complete the encoding of the prompt; None if the lease is lost."""
    with database.write() as transaction:
        return lifecycle.complete_encoding(transaction, lease, {"encode_ms": 7}, {"encoder": "cpu"})


def reencode(database: Database, lease: Lease) -> Job | None:
    """Return the job to the encoding stage; None if the lease is lost."""
    with database.write() as transaction:
        return lifecycle.reencode(transaction, lease, LOST)


def cancel(database: Database, job_id: uuid.UUID) -> Job:
    """Request cancellation and return the job."""
    with database.write() as transaction:
        return lifecycle.cancel(transaction, job_id)


def rescue(database: Database, *, excused: bool = False) -> list[Job]:
    """Rescue the jobs whose lease expired and return them."""
    with database.write() as transaction:
        return recovery.rescue(transaction, excused=excused)


def job_in(state: State, database: Database, clock: Clock, **fields: Any) -> Job:
    """Return a job that reached `state` by ordinary transitions."""
    job = submit(database, **fields)
    match state:
        case State.QUEUED:
            pass
        case State.RUNNING:
            claim(database)
        case State.SUCCEEDED:
            complete(database, claim(database))
        case State.FAILED:
            fail(database, claim(database), PERMANENT)
        case State.CANCELED:
            cancel(database, job.id)
        case State.EXPIRED:
            complete(database, claim(database))
            clock.advance(RETENTION_S)
            with database.write() as transaction:
                recovery.expire(transaction, job.id)
    found = fetch(database, job.id)
    assert found.status == state
    return found


def fetch(database: Database, job_id: uuid.UUID) -> Job:
    """Read the job from the database."""
    with database.read() as transaction:
        return queries.get(transaction, job_id)


def events(database: Database, job_id: uuid.UUID) -> list[str]:
    """Return the event types of the timeline, oldest first."""
    with database.read() as transaction:
        return [event.type for event in queries.timeline(transaction, job_id).events]


def webhook_types(database: Database, job_id: uuid.UUID) -> list[str]:
    """Return the types of the job's webhook events, oldest first."""
    with database.read() as transaction:
        return [webhook.type for webhook, _ in queries.timeline(transaction, job_id).webhooks]


def all_jobs(database: Database) -> Sequence[Job]:
    """Return every job, oldest first."""
    with database.read() as transaction:
        return transaction.session.scalars(select(Job).order_by(Job.id)).all()


def row(job: Job) -> dict[str, Any]:
    """Return every column of the job and of its queue entry, to compare them with earlier or later ones."""
    columns = {column.key: getattr(job, column.key) for column in Job.__mapper__.column_attrs}
    entry = {column.key: getattr(job.entry, column.key, None) for column in QueueEntry.__mapper__.column_attrs}
    return {**columns, "entry": entry}


def empty(database: Database, *spared: type[Table]) -> None:
    """Delete every row, except those of these tables; the marks of the queue go back to its beginning."""
    kind = database.engine.dialect.name
    with database.write() as transaction:
        if kind == "sqlite":
            transaction.session.execute(delete(SEARCH_INDEX))
        for table in reversed(Table.metadata.sorted_tables):
            if table not in [one.__table__ for one in (*spared, QueueMark)] and table.info.get(ONLY_ON, kind) == kind:
                transaction.session.execute(delete(table))
        transaction.session.execute(update(QueueMark).values(lowest=uuid.UUID(int=0)))


def wait_until_blocked(database: Database) -> None:
    """Wait until another connection to this PostgreSQL database waits for a lock."""

    def is_blocked() -> bool:
        with database.engine.connect() as connection:
            waiting = connection.exec_driver_sql(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
            ).scalar()
        return bool(waiting)

    wait_until(is_blocked)
