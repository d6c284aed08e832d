"""The durable record of webhook deliveries: which are due, who tries them, how each try went.

Takes a `Transaction`; events are written by `lifecycle` in the transaction that ends a job. Does not know HTTP.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select, update

from zcore.errors import NotFound
from zcore.jobs.database import Transaction
from zcore.jobs.models import Job, Output, WebhookAttempt, WebhookEvent
from zcore.jobs.states import State


@dataclass(frozen=True, slots=True)
class DueWebhook:
    """One event to be posted now. `output_keys` are those of the job's pictures, by index."""

    id: uuid.UUID
    type: str
    url: str
    snapshot: Mapping[str, Any]
    output_keys: Mapping[int, str]
    created_at: datetime
    attempt: int
    held_until: datetime  # the claim itself: who holds the event no longer decides its next time


@dataclass(frozen=True, slots=True)
class AttemptOutcome:
    """How a try went. `retry_in_s` None means no further try: delivered, or dead."""

    delivered: bool
    status_code: int | None
    answer: str
    duration_ms: int
    retry_in_s: float | None


def claim_due(transaction: Transaction, at_most: int, hold_s: float) -> list[DueWebhook]:
    """Events whose time has come, each now held for `hold_s` seconds: a deliverer that dies leaves them due again."""
    due = (
        select(WebhookEvent.id)
        .where(WebhookEvent.next_attempt_at <= transaction.now)
        .order_by(WebhookEvent.next_attempt_at)
        .limit(at_most)
        .with_for_update(skip_locked=True)
    )
    ids = transaction.session.scalars(due).all()
    if not ids:
        return []
    events = transaction.session.scalars(
        update(WebhookEvent)
        .where(WebhookEvent.id.in_(ids), WebhookEvent.next_attempt_at <= transaction.now)
        .values(attempt=WebhookEvent.attempt + 1, next_attempt_at=transaction.now + timedelta(seconds=hold_s))
        .returning(WebhookEvent)
        .execution_options(synchronize_session=False, populate_existing=True)
    ).all()
    keys = _output_keys(transaction, [event.job_id for event in events])
    return [
        DueWebhook(
            event.id,
            event.type,
            event.url,
            event.snapshot,
            keys.get(event.job_id, {}),
            event.created_at,
            event.attempt,
            transaction.now + timedelta(seconds=hold_s),
        )
        for event in events
    ]


def record_attempt(transaction: Transaction, webhook: DueWebhook, outcome: AttemptOutcome) -> None:
    """Writes the try down and decides the event's next time."""
    retry_at = None if outcome.retry_in_s is None else transaction.now + timedelta(seconds=outcome.retry_in_s)
    transaction.session.add(
        WebhookAttempt(
            event_id=webhook.id,
            number=webhook.attempt,
            at=transaction.now,
            duration_ms=outcome.duration_ms,
            status_code=outcome.status_code,
            answer=outcome.answer,
        )
    )
    transaction.session.execute(
        update(WebhookEvent)
        .where(WebhookEvent.id == webhook.id, WebhookEvent.next_attempt_at == webhook.held_until)
        .values(
            delivered_at=transaction.now if outcome.delivered else None,
            next_attempt_at=None if outcome.delivered else retry_at,
        )
        .execution_options(synchronize_session=False)
    )


def resend(transaction: Transaction, event_id: uuid.UUID) -> None:
    """Makes an event due now, with a fresh schedule, also when it was delivered or is dead. Raises `NotFound`."""
    found = transaction.session.scalars(
        update(WebhookEvent)
        .where(WebhookEvent.id == event_id)
        .values(attempt=0, delivered_at=None, next_attempt_at=transaction.now)
        .returning(WebhookEvent.id)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    if found is None:
        raise NotFound(f"there is no webhook event {event_id}")


def _output_keys(transaction: Transaction, job_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, dict[int, str]]:
    """Of the pictures that are still there: those of expired jobs were deleted."""
    keys: dict[uuid.UUID, dict[int, str]] = {}
    for job_id, position, key in transaction.session.execute(
        select(Output.job_id, Output.position, Output.key)
        .join(Job, Job.id == Output.job_id)
        .where(Output.job_id.in_(job_ids), Job.status == State.SUCCEEDED)
    ):
        keys.setdefault(job_id, {})[position] = key
    return keys
