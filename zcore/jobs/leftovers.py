"""The record of objects in storage that belong to no row: of ended and expired jobs, and of deleted uploads and LoRAs.

Takes a `Transaction`. A row is added in the transaction that makes the objects superfluous. Objects are deleted before
their row, so that a crash between the two leaves the row. Does not access storage.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

from sqlalchemy import ColumnElement, Select, delete, select

from zcore.jobs.database import Transaction
from zcore.jobs.models import Job, Leftover, LeftoverObject
from zcore.storage_keys import embedding_keys, output_keys

FIRST_RETRY, LONGEST_RETRY = timedelta(minutes=1), timedelta(hours=1)

Superfluous = Leftover | LeftoverObject
"""What one row names: the objects of a job, or one object."""
Row = TypeVar("Row", Leftover, LeftoverObject)


def add_images(transaction: Transaction, job: Job) -> None:
    """Record that the images of an expired job may be deleted now."""
    changed = {"retained_attempt": None, "due_at": transaction.now, "tries": 0}
    statement = transaction.insert(Leftover).values(
        job_id=job.id, attempts=job.attempt, images=job.request["n"], format=format_of(job), **changed
    )
    # What its earlier attempts left may not be deleted yet.
    transaction.session.execute(statement.on_conflict_do_update(index_elements=[Leftover.job_id], set_=changed))


def add_object(transaction: Transaction, key: str) -> None:
    """Record that an object may be deleted now; that of a put which ended late may be recorded already."""
    changed = {"due_at": transaction.now, "tries": 0}
    statement = transaction.insert(LeftoverObject).values(key=key, **changed)
    transaction.session.execute(statement.on_conflict_do_update(index_elements=[LeftoverObject.key], set_=changed))


def claim_due(transaction: Transaction, limit: int) -> list[Superfluous]:
    """Return what may be deleted now, up to `limit` rows of jobs and as many of single objects, the longest due first.

    Each is due again later, for the case that it cannot be deleted: after a minute, and twice as long each time, up to
    an hour.
    """
    claimed = [*_due(transaction, Leftover, limit), *_due(transaction, LeftoverObject, limit)]
    for one in claimed:
        one.due_at = transaction.now + min(FIRST_RETRY * 2 ** min(one.tries, 10), LONGEST_RETRY)
        one.tries += 1
    return claimed


def is_due(transaction: Transaction, table: type[Superfluous]) -> ColumnElement[bool]:
    """Return the condition that the objects of a row may be deleted now."""
    return table.due_at <= transaction.time()


def keys(found: Superfluous) -> list[str]:
    """Return the storage keys of the objects, whether they exist or not."""
    if isinstance(found, LeftoverObject):
        return [found.key]
    attempts = range(1, found.attempts + 1)
    unrecorded = [attempt for attempt in attempts if attempt != found.retained_attempt]
    return [
        *output_keys(found.job_id, unrecorded, found.images, found.format),
        *embedding_keys(found.job_id, attempts),
    ]


def forget(transaction: Transaction, claimed: Superfluous) -> None:
    """Delete the row after the objects, unless it has changed since it was claimed: then more is to be deleted."""
    table = type(claimed)
    is_same = (
        LeftoverObject.key == claimed.key if isinstance(claimed, LeftoverObject) else Leftover.job_id == claimed.job_id
    )
    transaction.session.execute(delete(table).where(is_same, table.due_at == claimed.due_at))


def format_of(job: Job) -> str:
    """Return the format of the job's images; rows older than the field lack it."""
    return job.request.get("format", "png")


def _due(transaction: Transaction, table: type[Row], limit: int) -> Sequence[Row]:
    statement: Select[Row] = (
        select(table)
        .where(is_due(transaction, table))
        .order_by(table.due_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return transaction.session.scalars(statement).all()
