"""The guarded statement behind every transition of an active job, with its events in the same transaction.

`move` changes the queue entry of a job that stays active, and only reads the job's row; `end` deletes the entry and
records in the row how the job ended. The entry is locked before the row, so that no two of them wait for each other.
Used by `lifecycle`, `claims` and `recovery`. Does not commit.
"""

import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import msgspec
from sqlalchemy import BindParameter, ColumnElement, Uuid, bindparam, delete, func, insert, inspect, select, update
from sqlalchemy.orm import lazyload
from sqlalchemy.orm.attributes import set_committed_value

from zcore.jobs import states
from zcore.jobs.database import Transaction
from zcore.jobs.leftovers import format_of
from zcore.jobs.models import Event, Job, Leftover, Output, QueueEntry, WebhookAttempt, WebhookEvent
from zcore.jobs.resource import snapshot
from zcore.jobs.states import State, Transition

NO_LEASE: dict[str, Any] = {"lease_token": None, "lease_until": None}
NO_PROGRESS: dict[str, Any] = {"progress_phase": None, "progress_step": 0, "progress_steps": 0}
LEFTOVER_DELAY = timedelta(minutes=10)
"""After this delay no lost worker still stores an object of an ended job."""
ALONE = (lazyload(Job.entry), lazyload(Job.outputs))
"""Options that load a job's row without what belongs to it."""


def move(
    transaction: Transaction,
    transition: Transition,
    *guard: ColumnElement[bool],
    detail: dict[str, Any] | None = None,
    **values: Any,
) -> Job | None:
    """Apply a transition to the one active job that `guard` selects, and set these columns of its queue entry.

    Returns the job after the change, or None if no entry passed the guard in one of the transition's source states.
    `detail` goes to the timeline event.
    """
    entry = transaction.session.scalars(
        update(QueueEntry)
        .where(QueueEntry.status.in_(transition.sources), *guard)
        .values(status=transition.target, **values)
        .returning(QueueEntry)
        .execution_options(synchronize_session=False, populate_existing=True)
    ).one_or_none()
    if entry is None:
        return None
    job = transaction.session.get_one(Job, entry.job_id, options=ALONE)
    attach(job, entry)
    record_event(transaction, job, transition.event, detail or {})
    return job


def end(
    transaction: Transaction,
    transition: Transition,
    *guard: ColumnElement[bool],
    detail: dict[str, Any] | None = None,
    outputs: Sequence[Output] = (),
    **values: Any,
) -> Job | None:
    """End the one active job that `guard` selects, with these outputs, and set these columns of its row.

    Returns the job after the change, or None if no entry passed the guard in one of the transition's source states. If
    the transition notifies and the job has a webhook URL, a webhook event that is due now is added.
    """
    entry = transaction.session.scalars(
        delete(QueueEntry)
        .where(QueueEntry.status.in_(transition.sources), *guard)
        .returning(QueueEntry)
        .execution_options(synchronize_session=False, populate_existing=True)
    ).one_or_none()
    if entry is None:
        return None
    transaction.session.expunge(entry)
    job = transaction.session.scalars(
        update(Job)
        .where(Job.id == entry.job_id)
        .values(
            stored_status=transition.target,
            completed_at=transaction.now,
            last_attempt=entry.attempt,
            last_worker=entry.worker,
            last_started_at=entry.started_at,
            last_stage=entry.stage,
            last_embedding_attempt=entry.embedding_attempt,
            last_cancel_requested_at=entry.cancel_requested_at,
            **values,
        )
        .returning(Job)
        .options(*ALONE)
        .execution_options(synchronize_session=False, populate_existing=True)
    ).one()
    attach(job, None, outputs)
    if outputs:
        transaction.session.connection().execute(insert(Output), [_row(output) for output in outputs])
    record_event(transaction, job, transition.event, detail or {})
    _record_leftovers(transaction, job, entry)
    if transition.notifies and job.webhook_url is not None:
        _record_webhook_event(transaction, job)
    return job


def cancel_if_requested(transaction: Transaction, *guard: ColumnElement[bool]) -> Job | None:
    """RUNNING -> CANCELED for the job that `guard` selects; None if its cancellation was not requested."""
    return end(transaction, states.CANCEL_RUNNING, *guard, QueueEntry.cancel_requested_at.is_not(None))


def record_event(transaction: Transaction, job: Job, event: str, detail: dict[str, Any]) -> None:
    """Add an event to the timeline of a job of which this transaction has locked the queue entry or the row."""
    values = {"job": job.id, "time": transaction.now, "name": event, "number": job.attempt, "facts": detail}
    transaction.session.connection().execute(_ADD_EVENT, values)


def next_id(table: type[Event | WebhookAttempt], job_id: uuid.UUID | BindParameter[uuid.UUID]) -> ColumnElement[int]:
    """Return the number of the next row of a job as an expression; the caller has locked what it belongs to."""
    last = select(func.max(table.id)).where(table.job_id == job_id).scalar_subquery()
    return func.coalesce(last, 0) + 1


# Built once, and executed past the session, which otherwise took a quarter of Python's time of a claim.
_ADD_EVENT = insert(Event).values(
    id=next_id(Event, bindparam("job", type_=Uuid())),
    job_id=bindparam("job"),
    at=bindparam("time"),
    type=bindparam("name"),
    attempt=bindparam("number"),
    detail=bindparam("facts"),
)


def attach(job: Job, entry: QueueEntry | None, outputs: Sequence[Output] = ()) -> None:
    """Complete a job whose queue entry and outputs are known, without reading them."""
    set_committed_value(job, "entry", entry)
    set_committed_value(job, "outputs", list(outputs))


def _row(output: Output) -> dict[str, Any]:
    return {column.key: getattr(output, column.key) for column in inspect(Output).column_attrs}


def _record_leftovers(transaction: Transaction, job: Job, entry: QueueEntry) -> None:
    """Record an ended job if objects of its attempts may be in storage that are not its outputs."""
    succeeded = job.status == State.SUCCEEDED
    unrecorded_attempts = entry.attempt - 1 if succeeded else entry.attempt
    if unrecorded_attempts == 0 and entry.embedding_attempt is None:
        return
    transaction.session.add(
        Leftover(
            job_id=job.id,
            attempts=entry.attempt,
            retained_attempt=entry.attempt if succeeded else None,
            images=job.request["n"],
            format=format_of(job),
            due_at=transaction.now + LEFTOVER_DELAY,
        )
    )


def _record_webhook_event(transaction: Transaction, job: Job) -> None:
    transaction.session.add(
        WebhookEvent(
            id=transaction.new_id(),
            job_id=job.id,
            type=f"job.{job.status}",
            url=job.webhook_url,
            snapshot=msgspec.to_builtins(snapshot(job), str_keys=True),
            created_at=transaction.now,
            next_attempt_at=transaction.now,
        )
    )
