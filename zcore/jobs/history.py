"""The end of the record: jobs that ended long ago are deleted with everything that belongs to them.

Takes a `Transaction`. A job stays while it is active, while any of its objects may be in storage, and while its webhook
is due. Its Idempotency-Key is older than it needs to be by then. Does not commit or access storage.
"""

import uuid
from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, delete, select

from zcore.jobs import search
from zcore.jobs.database import Transaction
from zcore.jobs.ids import first_id_at
from zcore.jobs.lifecycle import IDEMPOTENCY_KEY_LIFETIME
from zcore.jobs.models import Event, Job, Leftover, Output, WebhookAttempt, WebhookEvent
from zcore.jobs.states import State

WITHOUT_IMAGES = (State.EXPIRED, State.FAILED, State.CANCELED)
"""The states in which a job has no images in storage and never will, unless it is retried."""


def forget(transaction: Transaction, age_s: float, limit: int) -> int:
    """Delete up to `limit` jobs that ended more than `age_s` seconds ago, and return how many were deleted.

    `age_s` is at least a day, for which an Idempotency-Key leads to its job. Jobs that another transaction has locked
    are left for the next call.
    """
    ended_before = transaction.now - max(timedelta(seconds=age_s), IDEMPOTENCY_KEY_LIFETIME)
    job_ids: list[uuid.UUID] = []
    for state in WITHOUT_IMAGES:
        if len(job_ids) < limit:
            job_ids += _lock_old(transaction, state, ended_before, limit - len(job_ids))
    if job_ids:
        _delete(transaction, job_ids)
    return len(job_ids)


def _lock_old(transaction: Transaction, state: State, ended_before: datetime, limit: int) -> Sequence[uuid.UUID]:
    """Return jobs in this state that may go, the oldest first, locked: none of them can be retried any more."""
    statement = (
        select(Job.id)
        .where(
            Job.stored_status == state,
            Job.id < first_id_at(ended_before),
            Job.completed_at < ended_before,
            *_is_done(),
        )
        .order_by(Job.id)
        .limit(limit)
        .with_for_update(skip_locked=True, of=Job)
    )
    return transaction.session.scalars(statement).all()


def _is_done() -> tuple[ColumnElement[bool], ...]:
    """Return the conditions that nothing remains to be done for a job that has ended."""
    with_objects = select(Leftover.job_id).where(Leftover.job_id == Job.id)
    undelivered = select(WebhookEvent.id).where(
        WebhookEvent.job_id == Job.id, WebhookEvent.next_attempt_at.is_not(None)
    )
    return (~with_objects.exists(), ~undelivered.exists())


def _delete(transaction: Transaction, job_ids: Sequence[uuid.UUID]) -> None:
    search.remove(transaction, job_ids)
    webhooks = select(WebhookEvent.id).where(WebhookEvent.job_id.in_(job_ids))
    for statement in (
        delete(WebhookAttempt).where(WebhookAttempt.event_id.in_(webhooks)),
        delete(WebhookEvent).where(WebhookEvent.job_id.in_(job_ids)),
        delete(Event).where(Event.job_id.in_(job_ids)),
        delete(Output).where(Output.job_id.in_(job_ids)),
        delete(Job).where(Job.id.in_(job_ids)),
    ):
        transaction.session.execute(statement, execution_options={"synchronize_session": False})
