"""Periodic maintenance: recovery of lost jobs and notifications, and removal of what is no longer retained.

Takes a `Transaction`. Several processes may run maintenance at once: rows that another transaction has locked are
skipped. Does not commit, notify the broker or access storage.
"""

import uuid

from sqlalchemy import delete, select, text, tuple_, update

from zcore.jobs import guarded_update, leftovers, lifecycle, states
from zcore.jobs.claims import Lease, holds
from zcore.jobs.database import Condition, Transaction
from zcore.jobs.guarded_update import NO_LEASE, NO_PROGRESS, cancel_if_requested, record_event
from zcore.jobs.lifecycle import IDEMPOTENCY_KEY_LIFETIME, MAX_ATTEMPTS_BEGUN, POISON, Failure
from zcore.jobs.models import READY, IdempotencyKey, Job, QueueEntry, WebhookEvent, Worker
from zcore.stages import Stage

RESCUE_BATCH = 100
LOST_ALONE = Failure(
    POISON, "the worker was lost each time it worked on this job, although it ran no other job", retryable=False
)


def rescue(transaction: Transaction, *, excused: bool = False) -> list[Job]:
    """Take up to 100 jobs from workers whose lease has expired, and return them.

    Each is CANCELED if the caller requested that. Otherwise it is queued again, to run alone from now on: one of the
    jobs that the worker had may have killed it, and nobody knows which. That attempt is not counted. A job that ran
    alone is queued again while attempts are left, then FAILED.

    If they are `excused`, no worker could renew a lease, because the database was away: the loss proves nothing, and is
    neither counted nor a reason to run alone, until 100 attempts have begun.
    """
    lost = transaction.session.scalars(
        select(QueueEntry).where(*is_lost(transaction)).limit(RESCUE_BATCH).with_for_update(skip_locked=True)
    ).all()
    rescued = [_rescue_one(transaction, entry, excused and entry.attempt < MAX_ATTEMPTS_BEGUN) for entry in lost]
    return [job for job in rescued if job is not None]


def expire(transaction: Transaction, job_id: uuid.UUID) -> Job | None:
    """SUCCEEDED -> EXPIRED, and record the images for deletion; None if the retention time is not over."""
    job = transaction.session.scalars(
        update(Job)
        .where(Job.id == job_id, Job.stored_status.in_(states.EXPIRE.sources), Job.expires_at <= transaction.now)
        .values(stored_status=states.EXPIRE.target)
        .returning(Job)
        .execution_options(synchronize_session=False, populate_existing=True)
    ).one_or_none()
    if job is not None:
        leftovers.add_images(transaction, job)
        record_event(transaction, job, states.EXPIRE.event, {})
    return job


def mark_notified(transaction: Transaction, stage: Stage, overdue_s: float, limit: int) -> int:
    """Mark up to `limit` ready jobs at `stage` as notified now, and return how many were marked.

    Selects jobs without a notification, and those whose last one is more than `overdue_s` seconds old; higher priority
    first, then the older job.
    """
    overdue = (
        select(QueueEntry.job_id)
        .where(*is_unnoticed(transaction, overdue_s), QueueEntry.stage == stage)
        .order_by(QueueEntry.priority.desc(), QueueEntry.position)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    ids = transaction.session.scalars(overdue).all()
    if ids:
        transaction.session.execute(
            update(QueueEntry)
            .where(QueueEntry.job_id.in_(ids))
            .values(notified_at=transaction.now)
            .execution_options(synchronize_session=False)
        )
    return len(ids)


def follow_clock(transaction: Transaction, set_back_s: float) -> None:
    """Bring forward what waits for a time, because the database's clock was set back by `set_back_s` seconds.

    Otherwise jobs of dead workers, retries, notifications and webhooks would wait until it shows the same time again. A
    lease that was renewed since then is left alone. What is only deleted later than it should be waits, too.
    """
    now, before = transaction.time(), transaction.time(set_back_s)
    for table, column, since in (
        (QueueEntry, QueueEntry.lease_until, before),
        (QueueEntry, QueueEntry.available_at, now),
        (QueueEntry, QueueEntry.notified_at, now),
        (WebhookEvent, WebhookEvent.next_attempt_at, now),
        (Worker, Worker.seen_at, now),
    ):
        transaction.session.execute(
            update(table)
            .where(column > since)
            .values({column: transaction.earlier(column, set_back_s)})
            .execution_options(synchronize_session=False)
        )


def is_lost(transaction: Transaction) -> tuple[Condition, ...]:
    """Return the conditions that a running job's lease has expired."""
    return (text("status = 'running'"), QueueEntry.lease_until < transaction.time())


def is_unnoticed(transaction: Transaction, overdue_s: float) -> tuple[Condition, ...]:
    """Return the conditions that no worker was notified of a ready job within the last `overdue_s` seconds."""
    last = QueueEntry.notified_at
    return (text(READY), last.is_(None) | (last < transaction.time(-overdue_s)))


def forget_idempotency_keys(transaction: Transaction, limit: int) -> bool:
    """Delete up to `limit` of the idempotency keys that are more than 24 hours old. Return whether more may be left."""
    key = tuple_(IdempotencyKey.owner, IdempotencyKey.key)
    old = (
        select(IdempotencyKey.owner, IdempotencyKey.key)
        .where(IdempotencyKey.created_at < transaction.now - IDEMPOTENCY_KEY_LIFETIME)
        .limit(limit)
    )
    deleted = transaction.session.scalars(delete(IdempotencyKey).where(key.in_(old)).returning(IdempotencyKey.job_id))
    return len(deleted.all()) == limit


def _rescue_one(transaction: Transaction, entry: QueueEntry, excused: bool) -> Job | None:
    assert entry.lease_token is not None, "a running job has a lease"
    lease = Lease(entry.job_id, entry.lease_token)
    if entry.cancel_requested_at is not None:
        return cancel_if_requested(transaction, *holds(lease))
    charged = entry.isolated and not excused
    if charged and entry.attempts_left == 0:
        return lifecycle.fail_finally(transaction, states.ABANDON, lease, LOST_ALONE)
    return guarded_update.move(
        transaction,
        states.RESCUE,
        *holds(lease),
        attempts_left=entry.attempts_left + (0 if charged else 1),
        isolated=entry.isolated or not excused,
        notified_at=None,
        **NO_LEASE,
        **NO_PROGRESS,
    )
