"""Read-only queries on jobs.

Takes a `Transaction`. Lists are paged by key, not by offset: a page one million jobs down costs as much as the
first.
"""

import base64
import binascii
import re
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, func, select, tuple_
from sqlalchemy.orm import InstrumentedAttribute

from zcore.errors import InvalidRequest, NotFound
from zcore.jobs import claims, search
from zcore.jobs.database import Transaction
from zcore.jobs.ids import FIRST_ID, LAST_ID, first_id_at, nearest_id
from zcore.jobs.models import Event, Job, Output, QueueEntry, WebhookAttempt, WebhookEvent
from zcore.jobs.search import IdRange
from zcore.jobs.search_terms import parse_query
from zcore.jobs.states import ACTIVE, TERMINAL, State
from zcore.stages import Stage

COUNTED_AT_MOST = 10_000
POSITION_AT_MOST = 1_000
IDS_PER_QUERY = 500  # databases limit the number of parameters of a statement
# Fewer digits would also be numbers that occur in prompts, and name the jobs of months.
ID_BEGINNING = re.compile(r"[0-9a-f]{6,32}")


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Conditions on the jobs of a list; None means no condition.

    `text` is what a user looks for: words and metadata, as `search_terms.parse_query` reads them, or the beginning of
    an id, of at least six digits.
    """

    owner: str | None = None
    status: State | None = None
    text: str | None = None
    created_from: datetime | None = None
    created_before: datetime | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a list, newest first.

    `next_cursor` leads to older jobs and `previous_cursor`, with `newer`, to newer ones. Each is None if
    there is no such page.
    """

    jobs: Sequence[Job]
    next_cursor: str | None
    previous_cursor: str | None


@dataclass(frozen=True, slots=True)
class Timeline:
    """Events and webhook deliveries of a job, oldest first."""

    events: Sequence[Event]
    webhooks: Sequence[tuple[WebhookEvent, Sequence[WebhookAttempt]]]


def get(transaction: Transaction, job_id: uuid.UUID, owner: str | None = None, *, refresh: bool = False) -> Job:
    """Return a job, of any owner if `owner` is None. Raises `NotFound` if there is none.

    `refresh` reads the row again if the session has already loaded it.
    """
    job = transaction.session.get(Job, job_id, populate_existing=refresh)
    if job is None or (owner is not None and job.owner != owner):
        raise NotFound(f"there is no job {job_id}")
    return job


def queue_position(transaction: Transaction, job: Job) -> int | None:
    """Return the job's position in the queue of its stage, from 1; None if it is not queued. Stops at 1,001.

    A scheduled job is behind all that are ready.
    """
    if job.status != State.QUEUED:
        return None
    first = claims.ready_in_order(transaction, Stage(job.stage), POSITION_AT_MOST).subquery()
    numbered = select(first.c.job_id, func.row_number().over().label("position")).subquery()
    own = func.max(numbered.c.position).filter(numbered.c.job_id == job.id)
    return transaction.session.scalars(select(func.coalesce(own, func.count() + 1)).select_from(numbered)).one()


def queue_positions(transaction: Transaction, jobs: Sequence[Job]) -> dict[uuid.UUID, int]:
    """Return the positions of those jobs that are queued, as `queue_position` does, with one query per stage."""
    queued = [job for job in jobs if job.status == State.QUEUED]
    positions: dict[uuid.UUID, int] = {}
    for stage in {job.stage for job in queued}:
        first = transaction.session.scalars(claims.ready_in_order(transaction, Stage(stage), POSITION_AT_MOST)).all()
        found = {job_id: position for position, job_id in enumerate(first, start=1)}
        positions |= {job.id: found.get(job.id, len(first) + 1) for job in queued if job.stage == stage}
    return positions


def page(transaction: Transaction, wanted: JobFilter, cursor: str | None, limit: int, *, newer: bool = False) -> Page:
    """Return a page of `limit` jobs (1 to 200), newest first: those just older than the cursor or, with `newer`, newer.

    Raises `InvalidRequest` if the cursor is not one that this function returned.
    """
    find = _with_text if wanted.text else _without_text
    found = find(transaction, wanted, _id_range(wanted, cursor, newer), limit + 1)
    jobs = found[:limit][::-1] if newer else found[:limit]
    more = len(found) > limit  # in the direction of paging; in the other lies the page that the cursor came from
    has_older, has_newer = (cursor is not None, more) if newer else (more, cursor is not None)
    return Page(
        jobs,
        next_cursor=_to_cursor(jobs[-1].id) if jobs and has_older else None,
        previous_cursor=_to_cursor(jobs[0].id) if jobs and has_newer else None,
    )


def timeline(transaction: Transaction, job_id: uuid.UUID) -> Timeline:
    """Return the events and webhook deliveries of a job. The first event is its submission, which has no row."""
    submitted_at = transaction.session.scalar(select(Job.created_at).where(Job.id == job_id))
    events = [Event(job_id=job_id, at=submitted_at, type="queued", attempt=0, detail={})] if submitted_at else []
    events += transaction.session.scalars(select(Event).where(Event.job_id == job_id).order_by(Event.id))
    webhooks = transaction.session.scalars(
        select(WebhookEvent).where(WebhookEvent.job_id == job_id).order_by(WebhookEvent.id)
    ).all()
    attempts = transaction.session.scalars(
        select(WebhookAttempt).where(WebhookAttempt.job_id == job_id).order_by(WebhookAttempt.id)
    ).all()
    return Timeline(events, [(webhook, [a for a in attempts if a.event_id == webhook.id]) for webhook in webhooks])


def has_event(transaction: Transaction, job_id: uuid.UUID, attempt: int, types: Collection[str]) -> bool:
    """Return whether an event of one of these types was recorded in this attempt of a job."""
    found = select(Event.job_id).where(Event.job_id == job_id, Event.attempt == attempt, Event.type.in_(types))
    return transaction.session.scalar(select(found.exists())) is True


def last_detail(transaction: Transaction, job_id: uuid.UUID, event: str) -> dict[str, Any]:
    """Return the detail of a job's last event of this type; empty if there is none."""
    details = select(Event.detail).where(Event.job_id == job_id, Event.type == event).order_by(Event.id.desc())
    return transaction.session.scalar(details.limit(1)) or {}


def output(transaction: Transaction, job_id: uuid.UUID, position: int, owner: str | None = None) -> tuple[Job, Output]:
    """Return a job and its image at `position`. Raises `NotFound` if either does not exist."""
    job = get(transaction, job_id, owner)
    for row in job.outputs:
        if row.position == position:
            return job, row
    raise NotFound(f"job {job_id} has no output {position}")


def ended_among(transaction: Transaction, job_ids: Sequence[uuid.UUID]) -> list[uuid.UUID]:
    """Return the ids of those jobs that are in a terminal state. Accepts any number of ids."""
    ended: list[uuid.UUID] = []
    for start in range(0, len(job_ids), IDS_PER_QUERY):
        batch = job_ids[start : start + IDS_PER_QUERY]
        ended += transaction.session.scalars(select(Job.id).where(Job.id.in_(batch), Job.stored_status.in_(TERMINAL)))
    return ended


def counts_by_status(transaction: Transaction) -> dict[State, int]:
    """Return the number of jobs in each state. Each count stops at 10,000, so that the cost is bounded."""
    counts: dict[State, int] = {}
    for state in State:
        jobs = (
            select(QueueEntry.job_id).where(QueueEntry.status == state)
            if state in ACTIVE
            else select(Job.id).where(Job.stored_status == state)
        )
        counted = jobs.limit(COUNTED_AT_MOST).subquery()
        counts[state] = transaction.session.scalar(select(func.count()).select_from(counted)) or 0
    return counts


def is_past_retention(transaction: Transaction) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions that a job has images whose retention time is over."""
    return (Job.stored_status == State.SUCCEEDED, Job.expires_at <= transaction.time())


def past_retention(transaction: Transaction, limit: int) -> Sequence[Job]:
    """Return up to `limit` succeeded jobs whose retention time is over, the earliest to expire first."""
    statement = select(Job).where(*is_past_retention(transaction)).order_by(Job.expires_at).limit(limit)
    return transaction.session.scalars(statement).all()


def _with_text(transaction: Transaction, wanted: JobFilter, ids: IdRange, limit: int) -> Sequence[Job]:
    """Return the first `limit` jobs in the range that pass the filter, its text included."""
    text = wanted.text or ""
    found = search.find(transaction, parse_query(text, wanted.owner), _candidates(wanted, ids), ids, limit)
    named = _ids_beginning_with(text, ids)
    if named is not None:
        found += transaction.session.scalars(_candidates(wanted, named).limit(limit))
    first = sorted(set(found), reverse=ids.newest_first)[:limit]
    return transaction.session.scalars(select(Job).where(Job.id.in_(first)).order_by(ids.order(Job.id))).all()


def _without_text(transaction: Transaction, wanted: JobFilter, ids: IdRange, limit: int) -> Sequence[Job]:
    """Return the first `limit` jobs in the range that pass the filter."""
    return transaction.session.scalars(_candidates(wanted, ids).with_only_columns(Job).limit(limit)).all()


def _candidates(wanted: JobFilter, ids: IdRange) -> Select[uuid.UUID]:
    """Select the ids in the range of the jobs with the wanted owner and status, in order."""
    statement, key, lead = _listed(wanted)
    statement = statement.where(tuple_(*key) >= (*lead, ids.lowest), tuple_(*key) <= (*lead, ids.highest))
    if wanted.owner is not None:
        statement = statement.where(Job.owner == wanted.owner)
    return statement.order_by(*map(ids.order, key))


def _listed(
    wanted: JobFilter,
) -> tuple[Select[uuid.UUID], tuple[InstrumentedAttribute[Any], ...], tuple[State, ...]]:
    """Return a SELECT of the jobs in this state, and the columns of the index that lists them, with their first values.

    PostgreSQL assumes that the jobs of a state are spread evenly, and would look for the expired ones, which are all
    old, by reading every newer job; so the state leads both the range and the order. The few running jobs, and the
    queued ones of all owners, are read from the queue.
    """
    jobs = select(Job.id)
    if wanted.status is None:
        return jobs, (Job.id,), ()
    if wanted.status in ACTIVE:
        jobs = jobs.join(QueueEntry, QueueEntry.job_id == Job.id).where(QueueEntry.status == wanted.status)
        if wanted.status == State.RUNNING or wanted.owner is None:
            return jobs, (QueueEntry.job_id,), ()
    stored = State.QUEUED if wanted.status in ACTIVE else wanted.status
    if wanted.owner is not None:
        return jobs.where(Job.stored_status == stored), (Job.id,), ()
    return jobs, (Job.stored_status, Job.id), (stored,)


def _id_range(wanted: JobFilter, cursor: str | None, newer: bool) -> IdRange:
    """Return the range of ids to list. UUIDv7 makes a range of times a range of ids."""
    lowest = FIRST_ID.int if wanted.created_from is None else first_id_at(wanted.created_from).int
    highest = LAST_ID.int if wanted.created_before is None else first_id_at(wanted.created_before).int - 1
    if cursor is not None and newer:
        lowest = max(lowest, _from_cursor(cursor) + 1)
    elif cursor is not None:
        highest = min(highest, _from_cursor(cursor) - 1)
    return IdRange(nearest_id(lowest), nearest_id(highest), newest_first=not newer)


def _ids_beginning_with(text: str, among: IdRange) -> IdRange | None:
    """Return the part of the range whose ids begin with the text; None if it is no beginning of an id."""
    digits = text.strip().lower().replace("-", "")
    if not ID_BEGINNING.fullmatch(digits):
        return None
    lowest, highest = uuid.UUID(digits.ljust(32, "0")), uuid.UUID(digits.ljust(32, "f"))
    return replace(among, lowest=max(lowest, among.lowest), highest=min(highest, among.highest))


def _to_cursor(job_id: uuid.UUID) -> str:
    return base64.urlsafe_b64encode(job_id.bytes).decode().rstrip("=")


def _from_cursor(cursor: str) -> int:
    try:
        return uuid.UUID(bytes=base64.urlsafe_b64decode(cursor + "==")).int
    except (ValueError, binascii.Error) as error:
        detail = "must be the next_cursor or previous_cursor of an earlier page"
        raise InvalidRequest.field("cursor", detail, "query") from error
