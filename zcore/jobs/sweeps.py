"""The comparison of stored objects with the rows that they belong to, a page of keys at a time.

Takes a `Transaction`. Does not access storage.
"""

import uuid
from collections.abc import Collection, Sequence
from datetime import timedelta

from sqlalchemy import ColumnElement, Select, select, true, update

from zcore.jobs.database import Transaction
from zcore.jobs.ids import FIRST_ID, LAST_ID
from zcore.jobs.models import Input, Job, Leftover, Lora, Output, Sweep
from zcore.jobs.states import TERMINAL, State
from zcore.storage_keys import JOBS, UPLOADS, is_lora_key, is_upload_key, job_of

EXPECTED_AT_ONCE = 2000


def is_due(transaction: Transaction) -> ColumnElement[bool]:
    """Return the condition that a sweep may go on."""
    return Sweep.due_at <= transaction.time()


def next_due(transaction: Transaction) -> Sweep | None:
    """Return the sweep that has been due for the longest time; None if none is due."""
    return transaction.session.scalars(select(Sweep).where(is_due(transaction)).order_by(Sweep.due_at).limit(1)).first()


def go_on(transaction: Transaction, prefix: str, after: str, pause_s: float) -> None:
    """Let the sweep of this prefix go on after this key, `pause_s` seconds from now."""
    transaction.session.execute(
        update(Sweep)
        .where(Sweep.prefix == prefix)
        .values(after=after, due_at=transaction.now + timedelta(seconds=pause_s))
    )


def unowned(transaction: Transaction, keys: Collection[str]) -> list[str]:
    """Return those of these keys that this service makes, and that no row knows.

    Whatever an active job has stored belongs to it, and what an ended one may have left belongs to its `Leftover`.
    """
    jobs = {key: job_id for key in keys if (job_id := job_of(key)) is not None}
    uploads = [key for key in keys if is_upload_key(key)]
    loras = [key for key in keys if is_lora_key(key)]
    owners = _jobs_that_own_everything(transaction, set(jobs.values()))
    owned = {
        *_outputs_of(transaction, set(jobs.values())),
        *(key for key, job_id in jobs.items() if job_id in owners),
        *transaction.session.scalars(select(Input.storage_key).where(Input.storage_key.in_(uploads))),
        *transaction.session.scalars(select(Lora.storage_key).where(Lora.storage_key.in_(loras))),
    }
    return [key for key in (*jobs, *uploads, *loras) if key not in owned]


def expected(transaction: Transaction, prefix: str, after: str, until: str | None) -> list[str]:
    """Return some keys after `after`, up to `until` if that is given, under which there is an object by the rows."""
    if prefix == JOBS:
        keys = _outputs_between(transaction, job_of(after), None if until is None else job_of(until))
    else:
        column, is_stored = (
            (Input.storage_key, Input.stored_at.is_not(None)) if prefix == UPLOADS else (Lora.storage_key, true())
        )
        keys = transaction.session.scalars(
            select(column).where(column > after, is_stored).order_by(column).limit(EXPECTED_AT_ONCE)
        ).all()
    return [key for key in keys if key > after and (until is None or key <= until)]


def _jobs_that_own_everything(transaction: Transaction, job_ids: Collection[uuid.UUID]) -> set[uuid.UUID]:
    active = select(Job.id).where(Job.id.in_(job_ids), Job.stored_status.not_in(TERMINAL))
    with_leftovers = select(Leftover.job_id).where(Leftover.job_id.in_(job_ids))
    return {*transaction.session.scalars(active), *transaction.session.scalars(with_leftovers)}


def _outputs_of(transaction: Transaction, job_ids: Collection[uuid.UUID]) -> Sequence[str]:
    return transaction.session.scalars(_stored_outputs().where(Output.job_id.in_(job_ids), Job.id.in_(job_ids))).all()


def _outputs_between(transaction: Transaction, first: uuid.UUID | None, last: uuid.UUID | None) -> Sequence[str]:
    """Return the keys of some images of the jobs from `first` to `last`. The order of keys is that of the ids."""
    ids = (first or FIRST_ID, last or LAST_ID)
    statement = (
        _stored_outputs()
        .where(Output.job_id.between(*ids), Job.id.between(*ids))
        .order_by(Output.job_id, Output.position)
        .limit(EXPECTED_AT_ONCE)
    )
    return transaction.session.scalars(statement).all()


def _stored_outputs() -> Select[str]:
    """Return a SELECT of the keys of images whose retention is not over."""
    return select(Output.key).join(Job, Job.id == Output.job_id).where(Job.stored_status == State.SUCCEEDED)
