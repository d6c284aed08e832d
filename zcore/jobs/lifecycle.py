"""Every change a job can go through, each as one guarded UPDATE with its event, in the caller's transaction.

Takes a `Transaction` and what the change needs; gives the job after it, or None where the guard refused (another
process was first, the lease is lost, the state does not allow it). A change that ends a job writes its webhook event in
the same transaction. Does not commit, does not ring the broker, does not touch storage.
"""

import uuid
from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import msgspec
import uuid_utils
from sqlalchemy import ColumnElement, case, or_, select, update
from sqlalchemy.exc import IntegrityError

from zcore.errors import Conflict, KeyReused, NotFound
from zcore.jobs import inputs, states
from zcore.jobs.database import Transaction
from zcore.jobs.models import Event, Job, Output, WebhookEvent
from zcore.jobs.resource import snapshot
from zcore.jobs.states import TERMINAL, State, Transition
from zcore.request import Submission
from zcore.stages import Stage

IDEMPOTENCY_KEY_LIFE = timedelta(hours=24)
RESCUED_AT_ONCE = 100
RETRY_DOUBLINGS_AT_MOST = 10  # 2 s grow to 34 minutes and no further
_NO_LEASE: dict[str, Any] = {"lease_token": None, "lease_until": None}
_NO_ERROR: dict[str, Any] = {"error_code": None, "error_message": None, "error_retryable": None}
_NO_PROGRESS: dict[str, Any] = {"progress_phase": None, "progress_step": 0, "progress_steps": 0}


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to work on a job: without this very token nothing is written."""

    job_id: uuid.UUID
    token: uuid.UUID


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt failed. A retryable one is tried again while attempts are left."""

    code: str
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class StoredOutput:
    """One picture that lies in storage, to be recorded with its job."""

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
    """The job of a submission; `replayed` when an earlier one with the same Idempotency-Key already made it."""

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
    """A new QUEUED job, or the one that this owner's key already made within 24 hours.

    `fingerprint` is the SHA-256 of the body; `stage` is where the job begins. Raises `KeyReused` when the key was used
    with another body, and `InvalidRequest` for a new job whose inputs this owner does not have.
    """
    if idempotency_key is not None:
        earlier = _made_by_key(transaction, owner, idempotency_key, fingerprint)
        if earlier is not None:
            return Submitted(earlier, replayed=True)
    inputs.check(transaction, submission.request, owner)
    job = Job(
        id=new_id(),
        owner=owner,
        status=State.QUEUED,
        priority=submission.delivery.priority,
        request=msgspec.to_builtins(submission.request),
        prompt=submission.request.prompt,
        caller_metadata=dict(submission.delivery.metadata),
        webhook_url=submission.delivery.webhook_url,
        idempotency_key=idempotency_key,
        fingerprint=fingerprint,
        stage=stage,
        attempts_left=max_attempts,
        created_at=transaction.now,
        available_at=transaction.now,
        announced_at=transaction.now,
        outputs=[],
    )
    if idempotency_key is None:
        transaction.session.add(job)
        transaction.session.flush()
    else:
        try:
            with transaction.session.begin_nested():
                transaction.session.add(job)
        except IntegrityError:
            # The same key arrived twice at once: the other one won between our look and our insert.
            earlier = _made_by_key(transaction, owner, idempotency_key, fingerprint)
            if earlier is None:
                raise
            return Submitted(earlier, replayed=True)
    _record(transaction, job, "queued", {})
    return Submitted(job, replayed=False)


def claim(
    transaction: Transaction, worker: str, lease_s: float, stages: Collection[Stage] = tuple(Stage)
) -> Job | None:
    """The next best queued job at one of `stages`, now RUNNING under a fresh lease; None when nothing is due. Higher
    priority first, then the oldest.

    Who serves both stages is expected to do the whole job; who only encodes has it noted, before anything is stored,
    that this attempt may leave an embedding.
    """
    only_encodes = Stage.GENERATE not in stages
    best = (
        select(Job.id)
        .where(Job.status == State.QUEUED, Job.available_at <= transaction.now, *_at(stages))
        .order_by(Job.priority.desc(), Job.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    return _move(
        transaction,
        states.CLAIM,
        Job.id == best,
        detail={"worker": worker},
        attempt=Job.attempt + 1,
        attempts_left=Job.attempts_left - 1,
        worker=worker,
        lease_token=uuid.uuid4(),
        lease_until=transaction.now + timedelta(seconds=lease_s),
        started_at=transaction.now,
        embedding_attempt=Job.attempt + 1 if only_encodes else Job.embedding_attempt,
        **_NO_PROGRESS,
    )


def lease_of(job: Job) -> Lease:
    """The lease of a job that was just claimed."""
    assert job.lease_token is not None, "only a running job has a lease"
    return Lease(job.id, job.lease_token)


@dataclass(frozen=True, slots=True)
class Beat:
    """What a heartbeat found."""

    cancel_requested: bool


def heartbeat(
    transaction: Transaction, lease: Lease, lease_s: float, progress: tuple[str, int, int] | None = None
) -> Beat | None:
    """Renews the lease and writes progress (phase, step, steps); None when the lease is lost."""
    values: dict[str, Any] = {"lease_until": transaction.now + timedelta(seconds=lease_s)}
    if progress is not None:
        values |= dict(zip(("progress_phase", "progress_step", "progress_steps"), progress, strict=True))
    statement = (
        update(Job)
        .where(Job.id == lease.job_id, Job.status == State.RUNNING, Job.lease_token == lease.token)
        .values(**values)
        .returning(Job.cancel_requested_at)
        .execution_options(synchronize_session=False)
    )
    row = transaction.session.execute(statement).one_or_none()
    return None if row is None else Beat(cancel_requested=row[0] is not None)


def note(transaction: Transaction, lease: Lease, event: str, detail: dict[str, Any]) -> bool:
    """A line of a running job's timeline about what happened to it on its way; False when the lease is lost."""
    job = transaction.session.scalar(select(Job).where(*_holds(lease)).with_for_update())
    if job is not None:
        _record(transaction, job, event, detail)
    return job is not None


def complete(
    transaction: Transaction,
    lease: Lease,
    outputs: list[StoredOutput],
    metrics: dict[str, Any],
    engine: dict[str, Any],
    retention_s: float,
) -> Job | None:
    """RUNNING -> SUCCEEDED with its pictures; None when the lease is lost, and then nothing was written."""
    return _move(
        transaction,
        states.COMPLETE,
        *_holds(lease),
        outputs=outputs,
        completed_at=transaction.now,
        expires_at=transaction.now + timedelta(seconds=retention_s),
        metrics=metrics,
        engine=engine,
        **_NO_LEASE,
    )


def fail(transaction: Transaction, lease: Lease, failure: Failure, retry_delay_s: float) -> Job | None:
    """Ends the attempt: CANCELED when the caller wished so, QUEUED again after a delay that doubles with each attempt
    when a retry may help and attempts are left, else FAILED. None when the lease is lost."""
    detail = {"code": failure.code, "message": failure.message}
    attempt = _lock(transaction, lease)
    if attempt is None:
        return None
    canceled = _cancel_if_wished(transaction, *_holds(lease))
    if canceled is not None:
        return canceled
    if failure.retryable:
        delay_s = retry_delay_s * 2 ** min(attempt - 1, RETRY_DOUBLINGS_AT_MOST)
        postponed = _move(
            transaction,
            states.POSTPONE,
            *_holds(lease),
            Job.attempts_left > 0,
            detail=detail,
            available_at=transaction.now + timedelta(seconds=delay_s),
            announced_at=None,
            **_NO_LEASE,
            **_NO_PROGRESS,
        )
        if postponed is not None:
            return postponed
    return _move(transaction, states.FAIL, *_holds(lease), detail=detail, **_failed(transaction, failure))


def hand_back(transaction: Transaction, lease: Lease) -> Job | None:
    """A leaving worker's job returns to the queue, the attempt not counted; CANCELED when the caller wished so."""
    return _requeue(transaction, lease, states.HAND_BACK, attempts_left=Job.attempts_left + 1, announced_at=None)


def pass_on(transaction: Transaction, lease: Lease, metrics: dict[str, Any], engine: dict[str, Any]) -> Job | None:
    """The prompt's embedding is stored: the job is QUEUED for whoever paints, and counts as announced to them. The
    attempt did its part and costs nothing. CANCELED when the caller wished so, None when the lease is lost.
    """
    return _requeue(
        transaction,
        lease,
        states.PASS_ON,
        stage=Stage.GENERATE,
        attempts_left=Job.attempts_left + 1,
        available_at=transaction.now,
        announced_at=transaction.now,
        metrics=metrics,
        engine=engine,
    )


def reencode(transaction: Transaction, lease: Lease, failure: Failure) -> Job | None:
    """Back to whoever encodes, QUEUED, because of `failure`; FAILED when no attempts are left, so that encoder and
    painter cannot disagree for ever. A job that nobody has encoded yet goes without losing its attempt: it cannot come
    back like this. CANCELED when the caller wished so, None when the lease is lost.
    """
    detail = {"code": failure.code, "message": failure.message}
    never_encoded = Job.embedding_attempt.is_(None)
    sent = _requeue(
        transaction,
        lease,
        states.REENCODE,
        or_(never_encoded, Job.attempts_left > 0),
        detail=detail,
        stage=Stage.ENCODE,
        attempts_left=case((never_encoded, Job.attempts_left + 1), else_=Job.attempts_left),
        announced_at=transaction.now,
    )
    if sent is not None:
        return sent
    return _move(transaction, states.FAIL, *_holds(lease), detail=detail, **_failed(transaction, failure))


def cancel(transaction: Transaction, job_id: uuid.UUID) -> Job:
    """The wish to cancel: a queued job ends at once, a running one at its next step, an ended one stays as it is.

    Raises `NotFound`.
    """
    canceled = _move(transaction, states.CANCEL_QUEUED, Job.id == job_id, completed_at=transaction.now)
    if canceled is not None:
        return canceled
    wished = transaction.session.scalars(
        update(Job)
        .where(Job.id == job_id, Job.status == State.RUNNING, Job.cancel_requested_at.is_(None))
        .values(cancel_requested_at=transaction.now)
        .returning(Job)
        .execution_options(synchronize_session=False, populate_existing=True)
    ).one_or_none()
    if wished is not None:
        _record(transaction, wished, "cancel_requested", {})
        return wished
    job = transaction.session.get(Job, job_id, populate_existing=True)
    if job is None:
        raise NotFound(f"there is no job {job_id}")
    if job.status == State.QUEUED:
        # Its worker gave it back between the two statements.
        return cancel(transaction, job_id)
    return job


def acknowledge_cancel(transaction: Transaction, lease: Lease) -> Job | None:
    """The worker stopped because of the wish: RUNNING -> CANCELED. None when the lease is lost."""
    return _cancel_if_wished(transaction, *_holds(lease))


def retry(transaction: Transaction, job_id: uuid.UUID, max_attempts: int, stage: Stage = Stage.GENERATE) -> Job:
    """A failed or canceled job goes back to the queue with a fresh budget: to where it stood while it still has an
    embedding, else to `stage`, as a new one would.

    Raises `NotFound`, or `Conflict` in any other state.
    """
    job = _move(
        transaction,
        states.RETRY,
        Job.id == job_id,
        stage=case((Job.embedding_attempt.is_(None), stage), else_=Job.stage),
        attempts_left=max_attempts,
        available_at=transaction.now,
        announced_at=transaction.now,
        completed_at=None,
        cancel_requested_at=None,
        **_NO_ERROR,
        **_NO_PROGRESS,
    )
    if job is not None:
        return job
    job = transaction.session.get(Job, job_id, populate_existing=True)
    if job is None:
        raise NotFound(f"there is no job {job_id}")
    raise Conflict(f"job {job_id} is {job.status}; only a failed or canceled job can be retried")


def rescue(transaction: Transaction) -> list[Job]:
    """Jobs whose lease ran out: back to the queue, or ended where the caller wished so or no attempts are left."""
    lost = transaction.session.execute(
        select(Job.id, Job.lease_token)
        .where(Job.status == State.RUNNING, Job.lease_until < transaction.now)
        .limit(RESCUED_AT_ONCE)
        .with_for_update(skip_locked=True)
    ).all()
    rescued = [_rescue_one(transaction, Lease(job_id, token)) for job_id, token in lost if token is not None]
    return [job for job in rescued if job is not None]


def expire(transaction: Transaction, job_id: uuid.UUID) -> Job | None:
    """SUCCEEDED -> EXPIRED, after its pictures were deleted from storage; None unless retention is over."""
    return _move(transaction, states.EXPIRE, Job.id == job_id, Job.expires_at <= transaction.now)


def forget_embeddings(transaction: Transaction, job_id: uuid.UUID, attempt: int) -> bool:
    """The embeddings of this job's attempts up to `attempt` are deleted from storage; False when it has moved on."""
    forgotten = transaction.session.scalars(
        update(Job)
        .where(Job.id == job_id, Job.status.in_(TERMINAL), Job.attempt == attempt)
        .values(embedding_attempt=None)
        .returning(Job.id)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    return forgotten is not None


def mark_announced(transaction: Transaction, stage: Stage, silent_s: float, at_most: int) -> int:
    """How many due jobs at `stage` nobody has been told of for `silent_s` seconds; they count as announced from now
    on.
    """
    silent = (
        select(Job.id)
        .where(
            Job.status == State.QUEUED,
            Job.stage == stage,
            Job.available_at <= transaction.now,
            Job.announced_at.is_(None) | (Job.announced_at < transaction.now - timedelta(seconds=silent_s)),
        )
        .order_by(Job.priority.desc(), Job.id)
        .limit(at_most)
        .with_for_update(skip_locked=True)
    )
    ids = transaction.session.scalars(silent).all()
    if ids:
        transaction.session.execute(
            update(Job)
            .where(Job.id.in_(ids))
            .values(announced_at=transaction.now)
            .execution_options(synchronize_session=False)
        )
    return len(ids)


def forget_idempotency_keys(transaction: Transaction) -> None:
    """Keys older than 24 hours are free again."""
    transaction.session.execute(
        update(Job)
        .where(Job.idempotency_key.is_not(None), Job.created_at < transaction.now - IDEMPOTENCY_KEY_LIFE)
        .values(idempotency_key=None)
        .execution_options(synchronize_session=False)
    )


def new_id() -> uuid.UUID:
    """A UUIDv7 (RFC 9562): sorts by the time it was made."""
    return uuid.UUID(bytes=uuid_utils.uuid7().bytes)


def _move(
    transaction: Transaction,
    transition: Transition,
    *guard: ColumnElement[bool],
    detail: dict[str, Any] | None = None,
    outputs: list[StoredOutput] | None = None,
    **values: Any,
) -> Job | None:
    """The one UPDATE: allowed sources and the guard in its WHERE, its event and webhook event beside it."""
    statement = (
        update(Job)
        .where(Job.status.in_(transition.sources), *guard)
        .values(status=transition.target, **values)
        .returning(Job)
        .execution_options(synchronize_session=False, populate_existing=True)
    )
    job = transaction.session.scalars(statement).one_or_none()
    if job is None:
        return None
    if outputs:
        job.outputs.extend(_row(output) for output in outputs)
    _record(transaction, job, transition.event, detail or {})
    if transition.announces and job.webhook_url is not None:
        transaction.session.add(
            WebhookEvent(
                id=new_id(),
                job_id=job.id,
                type=f"job.{transition.target}",
                url=job.webhook_url,
                snapshot=msgspec.to_builtins(snapshot(job), str_keys=True),
                created_at=transaction.now,
                next_attempt_at=transaction.now,
            )
        )
    return job


def _requeue(
    transaction: Transaction,
    lease: Lease,
    transition: Transition,
    *guard: ColumnElement[bool],
    detail: dict[str, Any] | None = None,
    **values: Any,
) -> Job | None:
    """From its worker to the queue; CANCELED when the caller wished so, None when the lease is lost or the guard
    refuses.
    """
    if _lock(transaction, lease) is None:
        return None
    canceled = _cancel_if_wished(transaction, *_holds(lease))
    if canceled is not None:
        return canceled
    return _move(transaction, transition, *_holds(lease), *guard, detail=detail, **values, **_NO_LEASE, **_NO_PROGRESS)


def _at(stages: Collection[Stage]) -> tuple[ColumnElement[bool], ...]:
    """No condition for all stages: the queue's index has its order only over one stage, or over all."""
    return () if set(stages) == set(Stage) else (Job.stage.in_(stages),)


def _holds(lease: Lease) -> tuple[ColumnElement[bool], ...]:
    return (Job.id == lease.job_id, Job.lease_token == lease.token)


def _lock(transaction: Transaction, lease: Lease) -> int | None:
    """The attempt of this lease, its row locked: a wish to cancel comes before what follows or after it, never between
    two of its statements. None when the lease is lost.
    """
    return transaction.session.scalar(select(Job.attempt).where(*_holds(lease)).with_for_update())


def _cancel_if_wished(transaction: Transaction, *guard: ColumnElement[bool]) -> Job | None:
    return _move(
        transaction,
        states.CANCEL_RUNNING,
        *guard,
        Job.cancel_requested_at.is_not(None),
        completed_at=transaction.now,
        **_NO_LEASE,
    )


def _rescue_one(transaction: Transaction, lease: Lease) -> Job | None:
    expired = (*_holds(lease), Job.lease_until < transaction.now)
    canceled = _cancel_if_wished(transaction, *expired)
    if canceled is not None:
        return canceled
    rescued = _move(
        transaction, states.RESCUE, *expired, Job.attempts_left > 0, announced_at=None, **_NO_LEASE, **_NO_PROGRESS
    )
    if rescued is not None:
        return rescued
    failure = Failure(
        "worker_lost", "the worker was lost while it worked on this job, and no attempts are left", retryable=True
    )
    return _move(transaction, states.ABANDON, *expired, detail={"code": failure.code}, **_failed(transaction, failure))


def _failed(transaction: Transaction, failure: Failure) -> dict[str, Any]:
    return {
        "completed_at": transaction.now,
        "error_code": failure.code,
        "error_message": failure.message,
        "error_retryable": failure.retryable,
        **_NO_LEASE,
    }


def _made_by_key(transaction: Transaction, owner: str, key: str, fingerprint: str) -> Job | None:
    job = transaction.session.scalars(select(Job).where(Job.owner == owner, Job.idempotency_key == key)).one_or_none()
    if job is None:
        return None
    if job.created_at <= transaction.now - IDEMPOTENCY_KEY_LIFE:
        job.idempotency_key = None
        transaction.session.flush()
        return None
    if job.fingerprint != fingerprint:
        raise KeyReused.field("Idempotency-Key", "was already used with another body in the last 24 hours")
    return job


def _row(output: StoredOutput) -> Output:
    return Output(**{name: getattr(output, name) for name in StoredOutput.__slots__})


def _record(transaction: Transaction, job: Job, event: str, detail: dict[str, Any]) -> None:
    transaction.session.add(Event(job_id=job.id, at=transaction.now, type=event, attempt=job.attempt, detail=detail))
