"""The record of webhook deliveries: which events are due, and the result of each attempt.

Takes a `Transaction`. The transaction that ends a job adds its event (`guarded_update`). Does not depend on HTTP.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, insert, select, update

from zcore.errors import NotFound
from zcore.jobs.database import Transaction
from zcore.jobs.guarded_update import ALONE, next_id
from zcore.jobs.models import Job, Output, WebhookAttempt, WebhookEvent
from zcore.jobs.states import State


@dataclass(frozen=True, slots=True)
class DueWebhook:
    """An event to deliver now. `output_keys` are the storage keys of the job's images, by index."""

    id: uuid.UUID
    job_id: uuid.UUID
    type: str
    url: str
    snapshot: Mapping[str, Any]
    output_keys: Mapping[int, str]
    created_at: datetime
    attempt: int
    claimed_at: datetime
    held_until: datetime  # identifies the claim; an attempt recorded after it is lost does not reschedule the event


@dataclass(frozen=True, slots=True)
class AttemptOutcome:
    """Result of an attempt. `retry_in_s` is None if no attempt follows: the event is delivered or given up."""

    delivered: bool
    status_code: int | None
    response_body: str
    duration_ms: int
    retry_in_s: float | None


def claim_due(transaction: Transaction, limit: int, hold_s: float) -> list[DueWebhook]:
    """Claim up to `limit` due events, the longest due first.

    Each is held for `hold_s` seconds; if the claiming process dies, the event becomes due again.
    """
    due = (
        select(WebhookEvent.job_id, WebhookEvent.id)
        .where(is_due(transaction))
        .order_by(WebhookEvent.next_attempt_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    found = transaction.session.execute(due).all()
    if not found:
        return []
    job_ids, ids = zip(*found, strict=True)
    held_until = transaction.now + timedelta(seconds=hold_s)
    events = transaction.session.scalars(
        update(WebhookEvent)
        .where(
            WebhookEvent.job_id.in_(job_ids), WebhookEvent.id.in_(ids), WebhookEvent.next_attempt_at <= transaction.now
        )
        .values(attempt=WebhookEvent.attempt + 1, next_attempt_at=held_until)
        .returning(WebhookEvent)
        .execution_options(synchronize_session=False, populate_existing=True)
    ).all()
    keys = _output_keys(transaction, [event.job_id for event in events])
    return [
        DueWebhook(
            event.id,
            event.job_id,
            event.type,
            event.url,
            event.snapshot,
            keys.get(event.job_id, {}),
            event.created_at,
            event.attempt,
            transaction.now,
            held_until,
        )
        for event in events
    ]


def is_due(transaction: Transaction) -> ColumnElement[bool]:
    """Return the condition that an event is due."""
    return WebhookEvent.next_attempt_at <= transaction.time()


def record_attempt(
    transaction: Transaction, webhook: DueWebhook, outcome: AttemptOutcome, *, is_repeated: bool = False
) -> None:
    """Record an attempt, and set the time of the next one if the claim is still valid.

    A call that `is_repeated`, because the answer to the first one was lost, changes nothing if that one was written.
    Nothing is recorded if the job was deleted in the meantime.
    """
    event = _lock(transaction, webhook.job_id, webhook.id)
    if event is None:
        return
    is_claimed = event.next_attempt_at == webhook.held_until
    if is_repeated and not is_claimed:
        return
    transaction.session.execute(
        insert(WebhookAttempt).values(
            id=next_id(WebhookAttempt, webhook.job_id),
            job_id=webhook.job_id,
            event_id=webhook.id,
            number=webhook.attempt,
            at=transaction.now,
            duration_ms=outcome.duration_ms,
            status_code=outcome.status_code,
            response_body=outcome.response_body,
        )
    )
    if is_claimed:
        retry_in_s = None if outcome.delivered else outcome.retry_in_s
        event.delivered_at = transaction.now if outcome.delivered else None
        event.next_attempt_at = None if retry_in_s is None else transaction.now + timedelta(seconds=retry_in_s)


def resend(transaction: Transaction, job_id: uuid.UUID, event_id: uuid.UUID) -> None:
    """Make an event of a job due now, even if it was delivered or given up, and restart its retry schedule.

    Raises `NotFound` if there is no such event.
    """
    # Maintenance locks the row of a job that it deletes, and deletes none of which an event is due.
    transaction.session.get(Job, job_id, with_for_update=True, options=ALONE)
    event = _lock(transaction, job_id, event_id)
    if event is None:
        raise NotFound(f"job {job_id} has no webhook event {event_id}")
    event.attempt, event.delivered_at, event.next_attempt_at = 0, None, transaction.now


def _lock(transaction: Transaction, job_id: uuid.UUID, event_id: uuid.UUID) -> WebhookEvent | None:
    return transaction.session.get(WebhookEvent, (job_id, event_id), with_for_update=True, populate_existing=True)


def _output_keys(transaction: Transaction, job_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, dict[int, str]]:
    """Return the storage keys of each job's images, by index. The images of expired jobs were deleted."""
    keys: dict[uuid.UUID, dict[int, str]] = {}
    for job_id, position, key in transaction.session.execute(
        select(Output.job_id, Output.position, Output.key)
        .join(Job, Job.id == Output.job_id)
        .where(Output.job_id.in_(job_ids), Job.id.in_(job_ids), Job.stored_status == State.SUCCEEDED)
    ):
        keys.setdefault(job_id, {})[position] = key
    return keys
