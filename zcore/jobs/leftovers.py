"""The record of objects that ended jobs may have left in storage: images of lost attempts, and embeddings.

Takes a `Transaction`. `guarded_update` adds a row in the transaction that ends a job. Objects are deleted before their
row, so that a crash between the two leaves the row. Does not access storage.
"""

from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import ColumnElement, delete, select

from zcore.jobs.database import Transaction
from zcore.jobs.models import Leftover
from zcore.storage_keys import embedding_keys, output_keys

FIRST_RETRY, LONGEST_RETRY = timedelta(minutes=1), timedelta(hours=1)


def claim_due(transaction: Transaction, limit: int) -> Sequence[Leftover]:
    """Return up to `limit` leftovers whose objects may be deleted now, the longest due first.

    Each is due again later, for the case that its objects cannot be deleted: after a minute, and twice as long each
    time, up to an hour.
    """
    statement = (
        select(Leftover)
        .where(is_due(transaction))
        .order_by(Leftover.due_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    claimed = transaction.session.scalars(statement).all()
    for leftover in claimed:
        leftover.due_at = transaction.now + min(FIRST_RETRY * 2 ** min(leftover.tries, 10), LONGEST_RETRY)
        leftover.tries += 1
    return claimed


def is_due(transaction: Transaction) -> ColumnElement[bool]:
    """Return the condition that the objects may be deleted now."""
    return Leftover.due_at <= transaction.time()


def keys(leftover: Leftover) -> list[str]:
    """Return the storage keys of the objects that the job may have left, whether they exist or not."""
    attempts = range(1, leftover.attempts + 1)
    unrecorded = [attempt for attempt in attempts if attempt != leftover.retained_attempt]
    return [
        *output_keys(leftover.job_id, unrecorded, leftover.images, leftover.format),
        *embedding_keys(leftover.job_id, attempts),
    ]


def forget(transaction: Transaction, leftover: Leftover) -> bool:
    """Delete the row after the objects. Returns False, and deletes nothing, if the job has begun another attempt."""
    forgotten = transaction.session.scalar(
        delete(Leftover)
        .where(Leftover.job_id == leftover.job_id, Leftover.attempts == leftover.attempts)
        .returning(Leftover.job_id)
    )
    return forgotten is not None
