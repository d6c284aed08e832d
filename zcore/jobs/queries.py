"""Questions to the durable record. Read-only.

Takes a `Transaction`; gives rows and small values. Lists go by key, not by offset: the page at depth one million costs
what the first page costs.
"""

import base64
import binascii
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import ColumnElement, and_, func, or_, select, tuple_
from sqlalchemy.orm import selectinload

from zcore.errors import InvalidRequest, NotFound
from zcore.jobs.database import Transaction
from zcore.jobs.models import Event, Job, Output, WebhookAttempt, WebhookEvent
from zcore.jobs.states import State

COUNTED_AT_MOST = 10_000
POSITION_AT_MOST = 1_000
LAST_ID = 2**128 - 1


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs a list shows; None everywhere shows all. `text` is a part of the prompt, or a whole id."""

    owner: str | None = None
    status: State | None = None
    text: str | None = None
    created_from: datetime | None = None
    created_before: datetime | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """A stretch of a list, newest first. `next_cursor` leads to older jobs, `previous_cursor` (with `newer`) back to
    newer ones; each is None at its end.
    """

    jobs: Sequence[Job]
    next_cursor: str | None
    previous_cursor: str | None


@dataclass(frozen=True, slots=True)
class Timeline:
    """What happened to a job, oldest first."""

    events: Sequence[Event]
    webhooks: Sequence[tuple[WebhookEvent, Sequence[WebhookAttempt]]]


def get(transaction: Transaction, job_id: uuid.UUID, owner: str | None = None) -> Job:
    """The job, where `owner` (None: anybody) may see it. Raises `NotFound`."""
    job = transaction.session.get(Job, job_id)
    if job is None or (owner is not None and job.owner != owner):
        raise NotFound(f"there is no job {job_id}")
    return job


def queue_position(transaction: Transaction, job: Job) -> int | None:
    """1 for the job that is claimed next at its stage; None when it is not queued. Counts at most 1,000 before it."""
    if job.status != State.QUEUED:
        return None
    before = (
        select(Job.id)
        .where(
            Job.status == State.QUEUED,
            Job.stage == job.stage,
            or_(Job.priority > job.priority, and_(Job.priority == job.priority, Job.id < job.id)),
        )
        .limit(POSITION_AT_MOST)
        .subquery()
    )
    return 1 + (transaction.session.scalar(select(func.count()).select_from(before)) or 0)


def page(transaction: Transaction, wanted: JobFilter, cursor: str | None, limit: int, *, newer: bool = False) -> Page:
    """Jobs newest first, `limit` (1 to 200) at a time: those next below the cursor, or with `newer` next above it.

    Raises `InvalidRequest` for a cursor that this function did not make.
    """
    lowest, highest = _ids(wanted, cursor, newer)
    # A status of its own leads both range and order, so that only its index fits: PostgreSQL takes jobs of a status to
    # be spread evenly, and would look for the expired ones, all old, by reading every newer job.
    by_status = wanted.status is not None and wanted.owner is None
    key, lead = ((Job.status, Job.id), (wanted.status,)) if by_status else ((Job.id,), ())
    statement = (
        select(Job)
        .where(tuple_(*key) >= (*lead, lowest), tuple_(*key) <= (*lead, highest))
        .order_by(*(column.asc() if newer else column.desc() for column in key))
        .limit(limit + 1)
        .options(selectinload(Job.outputs))
    )
    if wanted.owner is not None:
        statement = statement.where(Job.owner == wanted.owner)
    if wanted.status is not None and not by_status:
        statement = statement.where(Job.status == wanted.status)
    if wanted.text:
        statement = statement.where(_matches(wanted.text))
    found = transaction.session.scalars(statement).all()
    jobs = found[:limit][::-1] if newer else found[:limit]
    more = len(found) > limit  # in the direction of travel; behind lies what the cursor came from
    older, younger = (cursor is not None, more) if newer else (more, cursor is not None)
    return Page(
        jobs,
        next_cursor=_to_cursor(jobs[-1].id) if jobs and older else None,
        previous_cursor=_to_cursor(jobs[0].id) if jobs and younger else None,
    )


def timeline(transaction: Transaction, job_id: uuid.UUID) -> Timeline:
    """Events and webhook deliveries of one job."""
    events = transaction.session.scalars(select(Event).where(Event.job_id == job_id).order_by(Event.id)).all()
    webhooks = transaction.session.scalars(
        select(WebhookEvent).where(WebhookEvent.job_id == job_id).order_by(WebhookEvent.id)
    ).all()
    attempts = transaction.session.scalars(
        select(WebhookAttempt)
        .where(WebhookAttempt.event_id.in_([webhook.id for webhook in webhooks]))
        .order_by(WebhookAttempt.id)
    ).all()
    return Timeline(events, [(webhook, [a for a in attempts if a.event_id == webhook.id]) for webhook in webhooks])


def output(transaction: Transaction, job_id: uuid.UUID, position: int, owner: str | None = None) -> tuple[Job, Output]:
    """One picture of a job. Raises `NotFound`."""
    job = get(transaction, job_id, owner)
    for row in job.outputs:
        if row.position == position:
            return job, row
    raise NotFound(f"job {job_id} has no output {position}")


def counts_by_status(transaction: Transaction) -> dict[State, int]:
    """How many jobs stand in each state, each counted up to 10,000, so that the cost is bounded."""
    counts: dict[State, int] = {}
    for state in State:
        some = select(Job.id).where(Job.status == state).limit(COUNTED_AT_MOST).subquery()
        counts[state] = transaction.session.scalar(select(func.count()).select_from(some)) or 0
    return counts


def busy_workers(transaction: Transaction) -> set[str]:
    """The names of the workers that have a running job."""
    names = transaction.session.scalars(select(Job.worker).where(Job.status == State.RUNNING).distinct())
    return {name for name in names if name is not None}


def past_retention(transaction: Transaction, at_most: int) -> Sequence[Job]:
    """Succeeded jobs whose pictures are due to be deleted."""
    statement = (
        select(Job)
        .where(Job.status == State.SUCCEEDED, Job.expires_at <= transaction.now)
        .order_by(Job.expires_at)
        .limit(at_most)
    )
    return transaction.session.scalars(statement).all()


def ended_with_embedding(transaction: Transaction, at_most: int) -> Sequence[Job]:
    """Jobs that have ended and whose embeddings may still be in storage, the first to end first."""
    statement = (
        select(Job)
        .where(Job.completed_at.is_not(None), Job.embedding_attempt.is_not(None))
        .order_by(Job.completed_at)
        .limit(at_most)
    )
    return transaction.session.scalars(statement).all()


def _matches(text: str) -> ColumnElement[bool]:
    """The prompt holds the text, or the job has this very id."""
    try:
        return Job.id == uuid.UUID(text.strip())
    except ValueError:
        pass
    escaped = text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return Job.prompt.ilike(f"%{escaped}%", escape="\\")


def _ids(wanted: JobFilter, cursor: str | None, newer: bool) -> tuple[uuid.UUID, uuid.UUID]:
    """The first and the last id that may be listed: a range of time is a range of keys."""
    lowest = 0 if wanted.created_from is None else _first_id_at(wanted.created_from)
    highest = LAST_ID if wanted.created_before is None else _first_id_at(wanted.created_before) - 1
    if cursor is not None and newer:
        lowest = max(lowest, _from_cursor(cursor) + 1)
    elif cursor is not None:
        highest = min(highest, _from_cursor(cursor) - 1)
    return uuid.UUID(int=min(lowest, LAST_ID)), uuid.UUID(int=max(highest, 0))


def _first_id_at(moment: datetime) -> int:
    """The smallest UUIDv7 of that millisecond; a time without a zone is UTC."""
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0, int(aware.timestamp() * 1000)) << 80


def _to_cursor(job_id: uuid.UUID) -> str:
    return base64.urlsafe_b64encode(job_id.bytes).decode().rstrip("=")


def _from_cursor(cursor: str) -> int:
    try:
        return uuid.UUID(bytes=base64.urlsafe_b64decode(cursor + "==")).int
    except (ValueError, binascii.Error) as fault:
        raise InvalidRequest.field("cursor", "is not one that this service gave") from fault
