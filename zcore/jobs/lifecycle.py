"""The changes that callers and workers make to a job, each a guarded statement with its event.

Takes a `Transaction`. A function that takes a lease returns the job after the change, or None, having written
nothing, if the lease is lost. A change that ends a job adds its webhook event in the same transaction. Does not commit,
notify the broker or access storage.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import msgspec
from sqlalchemy import delete, select, update

from zcore.errors import Conflict, KeyReused
from zcore.jobs import claims, guarded_update, queries, search, states, uploads
from zcore.jobs.claims import Lease, holds
from zcore.jobs.database import Transaction
from zcore.jobs.guarded_update import ALONE, NO_LEASE, NO_PROGRESS, attach, cancel_if_requested, record_event
from zcore.jobs.models import IdempotencyKey, Job, Leftover, Output, QueueEntry
from zcore.jobs.states import TERMINAL, State, Transition
from zcore.request import Submission
from zcore.stages import Stage

IDEMPOTENCY_KEY_LIFETIME = timedelta(hours=24)
MAX_ATTEMPTS_BEGUN = 100
"""From this attempt on, what would be excused is charged to the job too, so that no job is tried for ever."""
MAX_RETRY_DOUBLINGS = 10  # a delay of 2 s grows to 34 minutes at most
POISON = "poison"
"""Error code of a job that lost its worker again while it ran alone."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt failed. If it is retryable, the job is tried again while attempts are left.

    `charged` is false if the job is not to blame, as when storage is away: the attempt is then not counted.
    """

    code: str
    message: str
    retryable: bool
    charged: bool = True


@dataclass(frozen=True, slots=True)
class StoredOutput:
    """An image in storage, to be recorded with its job."""

    position: int
    key: str
    format: str
    width: int
    height: int
    bytes: int
    sha256: str
    seed: int


@dataclass(frozen=True, slots=True)
class Submitted:
    """The job of a submission. `replayed` is true if an earlier request with the same Idempotency-Key created it."""

    job: Job
    replayed: bool


def submit(
    transaction: Transaction,
    submission: Submission,
    owner: str,
    fingerprint: str,
    max_attempts: int,
    idempotency_key: str | None = None,
    stage: Stage = Stage.GENERATE,
) -> Submitted:
    """Create a QUEUED job at `stage`, or return the one that this owner created with the same key in the last 24 h.

    `fingerprint` is the SHA-256 of the body. Raises `KeyReused` if the key was used with another body, and
    `InvalidRequest` if a new job names an input that this owner does not have.
    """
    job_id = transaction.new_id()
    if idempotency_key is not None:
        earlier = _use_key(transaction, owner, idempotency_key, fingerprint, job_id)
        if earlier is not None:
            return Submitted(earlier, replayed=True)
    uploads.check(transaction, submission.request, owner)
    job = Job(
        id=job_id,
        owner=owner,
        priority=submission.delivery.priority,
        request=msgspec.to_builtins(submission.request),
        caller_metadata=dict(submission.delivery.metadata),
        webhook_url=submission.delivery.webhook_url,
        created_at=transaction.now,
        stored_status=State.QUEUED,
    )
    transaction.session.add(job)
    attach(job, _enqueue(transaction, job, stage, max_attempts))
    transaction.session.flush()
    search.add(transaction, job)
    return Submitted(job, replayed=False)


def complete(
    transaction: Transaction,
    lease: Lease,
    outputs: Sequence[StoredOutput],
    metrics: dict[str, Any],
    engine: dict[str, Any],
    retention_s: float,
) -> Job | None:
    """RUNNING -> SUCCEEDED with its images, which are retained for `retention_s` seconds from now.

    A success counts even if cancellation was requested in the meantime.
    """
    return guarded_update.end(
        transaction,
        states.COMPLETE,
        *holds(lease),
        outputs=[_output(lease.job_id, stored) for stored in outputs],
        expires_at=transaction.now + timedelta(seconds=retention_s),
        metrics=metrics,
        engine=engine,
    )


def fail(transaction: Transaction, lease: Lease, failure: Failure, retry_delay_s: float) -> Job | None:
    """End the attempt with an error.

    The job is CANCELED if the caller requested that. If the failure is retryable and attempts are left, the job is
    QUEUED again after a delay that starts at `retry_delay_s` seconds and doubles with each attempt. Otherwise it is
    FAILED. A failure that is not charged leaves the number of attempts as it was, until 100 have begun.
    """
    entry = claims.lock(transaction, lease)
    if entry is None:
        return None
    if entry.cancel_requested_at is not None:
        return cancel_if_requested(transaction, *holds(lease))
    returned = 0 if failure.charged or entry.attempt >= MAX_ATTEMPTS_BEGUN else 1
    if not failure.retryable or entry.attempts_left + returned == 0:
        return fail_finally(transaction, states.FAIL, lease, failure)
    delay_s = retry_delay_s * 2 ** min(entry.attempt - 1, MAX_RETRY_DOUBLINGS)
    return guarded_update.move(
        transaction,
        states.SCHEDULE_RETRY,
        *holds(lease),
        detail={"code": failure.code, "message": failure.message},
        attempts_left=entry.attempts_left + returned,
        available_at=transaction.now + timedelta(seconds=delay_s),
        scheduled=delay_s > 0,
        notified_at=None,
        **NO_LEASE,
        **NO_PROGRESS,
    )


def release(transaction: Transaction, lease: Lease) -> Job | None:
    """Return the job of a worker that is shutting down to the queue, without counting the attempt.

    The job is CANCELED if the caller requested that.
    """
    return _requeue(transaction, lease, states.RELEASE, attempts_left=QueueEntry.attempts_left + 1, notified_at=None)


def complete_encoding(
    transaction: Transaction, lease: Lease, metrics: dict[str, Any], engine: dict[str, Any]
) -> Job | None:
    """Queue the job for generation after its embedding was stored; the attempt is not counted.

    `metrics` and `engine` go to the timeline event, where the generating worker finds them (`queries.last_detail`): the
    job's row, which is wide, is not rewritten. The job counts as notified now, because the worker notifies the broker
    after the commit. The job is CANCELED if the caller requested that.
    """
    return _requeue(
        transaction,
        lease,
        states.COMPLETE_ENCODING,
        detail={"metrics": metrics, "engine": engine},
        stage=Stage.GENERATE,
        attempts_left=QueueEntry.attempts_left + 1,
        available_at=transaction.now,
        notified_at=transaction.now,
    )


def reencode(transaction: Transaction, lease: Lease, failure: Failure) -> Job | None:
    """Return the job to the encoding stage because of `failure`: the embedding is missing or does not fit.

    The job is FAILED if it has been encoded before and no attempts are left, so that it cannot alternate between the
    two stages without end. If it has never been encoded, the attempt is not counted: that cannot happen twice. The job
    is CANCELED if the caller requested that.
    """
    entry = claims.lock(transaction, lease)
    if entry is None:
        return None
    if entry.embedding_attempt is not None and entry.attempts_left == 0 and entry.cancel_requested_at is None:
        return fail_finally(transaction, states.FAIL, lease, failure)
    return _requeue(
        transaction,
        lease,
        states.REENCODE,
        detail={"code": failure.code, "message": failure.message},
        stage=Stage.ENCODE,
        attempts_left=entry.attempts_left + (1 if entry.embedding_attempt is None else 0),
        notified_at=transaction.now,
    )


def cancel(transaction: Transaction, job_id: uuid.UUID) -> Job:
    """Request cancellation. A queued job ends at once, a running one at its next step; an ended one does not change.

    Raises `NotFound` if there is no such job.
    """
    entry = transaction.session.get(QueueEntry, job_id, with_for_update=True, populate_existing=True)
    if entry is None:
        job = queries.get(transaction, job_id, refresh=True)
        # An ended job may have been retried between the two statements.
        return job if job.status in TERMINAL else cancel(transaction, job_id)
    if entry.status == State.QUEUED:
        canceled = guarded_update.end(transaction, states.CANCEL_QUEUED, QueueEntry.job_id == job_id)
        assert canceled is not None, "the entry is locked"
        return canceled
    job = transaction.session.get_one(Job, job_id, options=ALONE)
    attach(job, entry)
    if entry.cancel_requested_at is None:
        entry.cancel_requested_at = transaction.now
        record_event(transaction, job, "cancel_requested", {})
    return job


def acknowledge_cancel(transaction: Transaction, lease: Lease) -> Job | None:
    """RUNNING -> CANCELED after the worker stopped; None if the lease is lost or no cancellation was requested."""
    return cancel_if_requested(transaction, *holds(lease))


def retry(transaction: Transaction, job_id: uuid.UUID, max_attempts: int, stage: Stage = Stage.GENERATE) -> Job:
    """Queue a failed or canceled job again, with `max_attempts` new attempts.

    It continues at the stage it was at if it still has an embedding, otherwise it starts at `stage`. Raises `NotFound`
    if there is no such job, and `Conflict` if it is in any other state.
    """
    failed_as = transaction.session.scalar(select(Job.error_code).where(Job.id == job_id))
    job = transaction.session.scalars(
        update(Job)
        .where(Job.id == job_id, Job.stored_status.in_(states.RETRY.sources))
        .values(
            stored_status=states.RETRY.target,
            completed_at=None,
            error_code=None,
            error_message=None,
            error_retryable=None,
        )
        .returning(Job)
        .options(*ALONE)
        .execution_options(synchronize_session=False, populate_existing=True)
    ).one_or_none()
    if job is None:
        job = queries.get(transaction, job_id, refresh=True)
        raise Conflict(f"job {job_id} is {job.status}; only a failed or canceled job can be retried")
    has_objects = transaction.session.scalar(
        delete(Leftover).where(Leftover.job_id == job_id).returning(Leftover.job_id)
    )
    embedding_attempt = job.last_embedding_attempt if has_objects is not None else None
    entry = _enqueue(
        transaction,
        job,
        stage if embedding_attempt is None else Stage(job.last_stage or stage),
        max_attempts,
        attempt=job.last_attempt or 0,
        embedding_attempt=embedding_attempt,
        isolated=failed_as == POISON,
    )
    attach(job, entry)
    transaction.session.flush()
    claims.lower_marks(transaction, [(entry.stage, entry.priority, job_id)])
    record_event(transaction, job, states.RETRY.event, {})
    return job


def fail_finally(transaction: Transaction, transition: Transition, lease: Lease, failure: Failure) -> Job | None:
    """End the lease's job with this failure; None if the lease is lost."""
    return guarded_update.end(
        transaction,
        transition,
        *holds(lease),
        detail={"code": failure.code, "message": failure.message},
        error_code=failure.code,
        error_message=failure.message,
        error_retryable=failure.retryable,
    )


def _enqueue(
    transaction: Transaction,
    job: Job,
    stage: Stage,
    max_attempts: int,
    *,
    attempt: int = 0,
    embedding_attempt: int | None = None,
    isolated: bool = False,
) -> QueueEntry:
    """Add the queue entry of a job that is due now and whose worker is notified after the commit."""
    entry = QueueEntry(
        job_id=job.id,
        owner=job.owner,
        status=State.QUEUED,
        stage=stage,
        priority=job.priority,
        position=job.id,
        scheduled=False,
        available_at=transaction.now,
        notified_at=transaction.now,
        attempt=attempt,
        attempts_left=max_attempts,
        isolated=isolated,
        embedding_attempt=embedding_attempt,
        **NO_PROGRESS,
    )
    transaction.session.add(entry)
    return entry


def _requeue(
    transaction: Transaction,
    lease: Lease,
    transition: Transition,
    detail: dict[str, Any] | None = None,
    **values: Any,
) -> Job | None:
    """Move the job from its worker to the queue, or cancel it if requested; None if the lease is lost."""
    entry = claims.lock(transaction, lease)
    if entry is None:
        return None
    if entry.cancel_requested_at is not None:
        return cancel_if_requested(transaction, *holds(lease))
    return guarded_update.move(
        transaction, transition, *holds(lease), detail=detail, **values, **NO_LEASE, **NO_PROGRESS
    )


def _use_key(transaction: Transaction, owner: str, key: str, fingerprint: str, job_id: uuid.UUID) -> Job | None:
    """Record that the key creates `job_id`, or return the job that it created in the last 24 hours.

    Waits for a transaction that uses the same key at the same time.
    """
    values = {"job_id": job_id, "fingerprint": fingerprint, "created_at": transaction.now}
    statement = (
        transaction.insert(IdempotencyKey)
        .values(owner=owner, key=key, **values)
        .on_conflict_do_update(
            index_elements=[IdempotencyKey.owner, IdempotencyKey.key],
            set_=values,
            where=IdempotencyKey.created_at <= transaction.now - IDEMPOTENCY_KEY_LIFETIME,
        )
    )
    if transaction.session.scalar(statement.returning(IdempotencyKey.job_id)) is not None:
        return None
    earlier = transaction.session.get_one(IdempotencyKey, (owner, key))
    if earlier.fingerprint != fingerprint:
        raise KeyReused.field(
            "Idempotency-Key", "was already used with a different body in the last 24 hours; use a new key", "header"
        )
    return queries.get(transaction, earlier.job_id)


def _output(job_id: uuid.UUID, stored: StoredOutput) -> Output:
    return Output(job_id=job_id, **{name: getattr(stored, name) for name in StoredOutput.__slots__})
