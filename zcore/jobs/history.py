"""The end of the record: jobs that ended long ago are deleted with everything that belongs to them.

Takes a `Transaction`. A job stays while it is active, while any of its objects may be in storage, and while its webhook
is due. Its Idempotency-Key is older than it needs to be by then. Does not commit or access storage.
"""

import uuid
from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, and_, delete, select

from zcore.jobs import partitions, search
from zcore.jobs.database import Transaction
from zcore.jobs.ids import first_id_at
from zcore.jobs.lifecycle import IDEMPOTENCY_KEY_LIFETIME
from zcore.jobs.models import Event, Job, Leftover, Output, SearchTerms, WebhookAttempt, WebhookEvent
from zcore.jobs.partitions import Partition
from zcore.jobs.states import State

WITHOUT_IMAGES = (State.EXPIRED, State.FAILED, State.CANCELED)
"""The states in which a job has no images in storage and never will, unless it is retried."""


def forget(transaction: Transaction, age_s: float, limit: int) -> int:
    """Delete up to `limit` jobs that ended more than `age_s` seconds ago, and return how many were deleted.

    `age_s` is at least a day, for which an Idempotency-Key leads to its job. Jobs that another transaction has locked
    are left for the next call.
    """
    ended_before = end_of_history(transaction, age_s)
    job_ids: list[uuid.UUID] = []
    for state in WITHOUT_IMAGES:
        if len(job_ids) < limit:
            job_ids += _lock_old(transaction, state, ended_before, limit - len(job_ids))
    if job_ids:
        _delete(transaction, job_ids)
    return len(job_ids)


def old_partitions(transaction: Transaction, age_s: float) -> list[Partition]:
    """Return the partitions that are older than `age_s` seconds, for `partitions.drop`; none on SQLite."""
    end = first_id_at(end_of_history(transaction, age_s))
    return [one for one in partitions.find_all(transaction) if one.end is not None and one.end <= end]


def forget_terms(transaction: Transaction, limit: int) -> int:
    """Delete up to `limit` entries of the search that belong to jobs of dropped partitions; return their number."""
    deleted = 0
    for gap in partitions.gaps(partitions.find_all(transaction)):
        if deleted < limit:
            in_gap = and_(*partitions.within(SearchTerms.job_id, gap))
            deleted += search.remove_range(transaction, in_gap, limit - deleted)
    return deleted


def end_of_history(transaction: Transaction, age_s: float) -> datetime:
    """Return the time before which jobs must have ended to be deleted. It is a day ago or earlier."""
    return transaction.now - max(timedelta(seconds=age_s), IDEMPOTENCY_KEY_LIFETIME)


def _lock_old(transaction: Transaction, state: State, ended_before: datetime, limit: int) -> Sequence[uuid.UUID]:
    """Return jobs in this state that may go, the oldest first, locked: none of them can be retried any more."""
    statement = (
        select(Job.id)
        .where(
            Job.stored_status == state,
            Job.id < _end_of_ids(transaction, ended_before),
            Job.completed_at < ended_before,
            *_is_done(),
        )
        .order_by(Job.id)
        .limit(limit)
        .with_for_update(skip_locked=True, of=Job)
    )
    return transaction.session.scalars(statement).all()


def _end_of_ids(transaction: Transaction, ended_before: datetime) -> uuid.UUID:
    """Return a bound of the ids to look at. On PostgreSQL a week that is not over yet is dropped as a whole later."""
    if transaction.is_postgresql:
        ended_before = partitions.begin_of_week(ended_before)
    return first_id_at(ended_before)


def _is_done() -> tuple[ColumnElement[bool], ...]:
    """Return the conditions that nothing remains to be done for a job that has ended."""
    with_objects = select(Leftover.job_id).where(Leftover.job_id == Job.id)
    undelivered = select(WebhookEvent.id).where(
        WebhookEvent.job_id == Job.id, WebhookEvent.next_attempt_at.is_not(None)
    )
    return (~with_objects.exists(), ~undelivered.exists())


def _delete(transaction: Transaction, job_ids: Sequence[uuid.UUID]) -> None:
    search.remove(transaction, job_ids)
    for statement in (
        delete(WebhookAttempt).where(WebhookAttempt.job_id.in_(job_ids)),
        delete(WebhookEvent).where(WebhookEvent.job_id.in_(job_ids)),
        delete(Event).where(Event.job_id.in_(job_ids)),
        delete(Output).where(Output.job_id.in_(job_ids)),
        delete(Job).where(Job.id.in_(job_ids)),
    ):
        transaction.session.execute(statement, execution_options={"synchronize_session": False})
