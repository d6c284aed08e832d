"""Claims and leases: which worker may work on a job, and for how long.

Takes a `Transaction`. Does not commit.
"""

import uuid
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Integer,
    ScalarSelect,
    Select,
    String,
    TableValuedAlias,
    Uuid,
    column,
    func,
    literal,
    select,
    text,
    true,
    tuple_,
    union_all,
    update,
)

from zcore.jobs import guarded_update, states
from zcore.jobs.database import Condition, Transaction
from zcore.jobs.guarded_update import NO_PROGRESS
from zcore.jobs.ids import FIRST_ID, first_id_at
from zcore.jobs.models import READY, Job, QueueEntry, QueueMark
from zcore.request import HIGHEST_PRIORITY, LOWEST_PRIORITY
from zcore.stages import Stage

PROMOTED_AT_ONCE = 100
MARK_DISTANCE = timedelta(minutes=1)
"""A submission that commits within this time has its id above every mark."""
# At equal priority, generation comes first: it finishes what has begun.
_STAGES_IN_ORDER = (Stage.GENERATE, Stage.ENCODE)


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to work on a job. Every write by a worker names the token and is refused once it is invalid."""

    job_id: uuid.UUID
    token: uuid.UUID


@dataclass(frozen=True, slots=True)
class LeaseRenewal:
    """Result of a heartbeat that renewed the lease."""

    cancel_requested: bool


def claim(
    transaction: Transaction, worker: str, lease_s: float, stages: Collection[Stage] = tuple(Stage)
) -> Job | None:
    """Claim the next due job at one of `stages` and return it, RUNNING under a new lease; None if no job is due.

    Higher priority comes first, then generation before encoding, then the older job. A worker that serves both stages
    is expected to do the whole job. If the worker only encodes, `embedding_attempt` is set now, before anything is
    stored, because from now on this attempt may leave an embedding in storage.
    """
    claimed = _claim_ready(transaction, worker, lease_s, stages)
    if claimed is None and promote(transaction):
        claimed = _claim_ready(transaction, worker, lease_s, stages)
    return claimed


def promote(transaction: Transaction) -> int:
    """Make up to 100 scheduled jobs ready that are due now, and return their number.

    Locks their entries, then marks. Called once in a transaction, so that marks are always locked in one order.
    """
    due = (
        select(QueueEntry.job_id)
        .where(*is_due(transaction))
        .order_by(QueueEntry.available_at)
        .limit(PROMOTED_AT_ONCE)
        .with_for_update(skip_locked=True)
        .cte("due")
    )
    promoted = transaction.session.execute(
        update(QueueEntry)
        .where(QueueEntry.job_id.in_(select(due.c.job_id)))
        .values(scheduled=False)
        .returning(QueueEntry.stage, QueueEntry.priority, QueueEntry.job_id)
        .execution_options(synchronize_session=False)
    ).all()
    lower_marks(transaction, [(stage, priority, job_id) for stage, priority, job_id in promoted])
    return len(promoted)


def ready_in_order(transaction: Transaction, stage: Stage, limit: int) -> Select[uuid.UUID]:
    """Return a SELECT of the first `limit` ready jobs of a stage in the order in which they are claimed."""
    if not transaction.is_postgresql:
        return (
            select(QueueEntry.job_id)
            .where(text(READY), QueueEntry.stage == stage)
            .order_by(QueueEntry.priority.desc(), QueueEntry.position)
            .limit(limit)
        )
    level, ready = _ready_by_level([stage])
    first = ready.limit(limit).lateral("first")
    return select(first.c.job_id).select_from(level.join(first, true())).limit(limit)


def is_due(transaction: Transaction) -> tuple[Condition, ...]:
    """Return the conditions that a scheduled job is due."""
    return (text("scheduled"), QueueEntry.available_at <= transaction.time())


def lease_of(job: Job) -> Lease:
    """Return the lease of a job that was just claimed."""
    assert job.lease_token is not None, "only a running job has a lease"
    return Lease(job.id, job.lease_token)


def heartbeat(
    transaction: Transaction, lease: Lease, lease_s: float, progress: tuple[str, int, int] | None = None
) -> LeaseRenewal | None:
    """Renew the lease for `lease_s` seconds from now and store the progress (phase, step, steps).

    Returns None if the lease is lost.
    """
    changed: dict[str, Any] = {"lease_until": transaction.time(lease_s)}
    if progress is not None:
        changed |= dict(zip(("progress_phase", "progress_step", "progress_steps"), progress, strict=True))
    row = transaction.session.execute(
        update(QueueEntry)
        .where(*holds(lease))
        .values(**changed)
        .returning(QueueEntry.cancel_requested_at)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    return None if row is None else LeaseRenewal(cancel_requested=row[0] is not None)


def cancellation_requested(transaction: Transaction, lease: Lease) -> bool | None:
    """Return whether cancellation of the job was requested; None if the lease is lost. Writes nothing."""
    row = transaction.session.execute(select(QueueEntry.cancel_requested_at).where(*holds(lease))).one_or_none()
    return None if row is None else row[0] is not None


def add_event(transaction: Transaction, lease: Lease, event: str, detail: dict[str, Any]) -> bool:
    """Add an event to a running job's timeline. Returns False if the lease is lost."""
    entry = lock(transaction, lease)
    if entry is not None:
        job = transaction.session.get_one(Job, lease.job_id, options=guarded_update.ALONE)
        guarded_update.attach(job, entry)
        guarded_update.record_event(transaction, job, event, detail)
    return entry is not None


def holds(lease: Lease) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions that select the lease's queue entry only while the lease is valid."""
    return (QueueEntry.job_id == lease.job_id, QueueEntry.lease_token == lease.token)


def lock(transaction: Transaction, lease: Lease) -> QueueEntry | None:
    """Lock the job's queue entry and return it; None if the lease is lost.

    A cancellation request then comes before or after the statements that follow, never between two of them.
    """
    return transaction.session.scalar(
        select(QueueEntry).where(*holds(lease)).with_for_update().execution_options(populate_existing=True)
    )


def advance_marks(transaction: Transaction) -> None:
    """Raise each mark to the first job that may still be claimed at its stage and priority (PostgreSQL only).

    Running jobs count at every stage and priority: they may become ready again where they were. A mark stays a minute
    behind the time, because a transaction that is still open may have submitted a job. Marks that another transaction
    has locked are left for the next call.
    """
    if not transaction.is_postgresql:
        return
    locked = _lock_marks(transaction)
    if not locked:
        return
    bound = first_id_at(transaction.now - MARK_DISTANCE)
    first_running = select(QueueEntry.job_id).where(text("status = 'running'")).order_by(QueueEntry.job_id).limit(1)
    first_ready = _first_ready(QueueEntry.position >= QueueMark.lowest)
    candidates = (func.coalesce(one.scalar_subquery(), bound) for one in (first_running, first_ready))
    _set_marks(transaction, locked, func.least(bound, *candidates))


def repair_marks(transaction: Transaction) -> None:
    """Lower each mark that a ready job lies below (PostgreSQL only).

    That happens if the database's clock was set back, or if a submission was open for more than a minute. Marks
    that another transaction has locked are left for the next call.
    """
    if not transaction.is_postgresql:
        return
    locked = _lock_marks(transaction)
    if locked:
        below = _first_ready(QueueEntry.position < QueueMark.lowest).scalar_subquery()
        _set_marks(transaction, locked, func.coalesce(below, QueueMark.lowest))


def lower_marks(transaction: Transaction, ready: Iterable[tuple[str, int, uuid.UUID]]) -> None:
    """Lower the marks to these jobs (stage, priority, id), which just became ready (PostgreSQL only).

    Always locks the marks: otherwise `advance_marks` could raise one beyond a job that it cannot see yet.
    """
    if not transaction.is_postgresql:
        return
    lowest: dict[tuple[str, int], uuid.UUID] = {}
    for stage, priority, job_id in ready:
        lowest[stage, priority] = min(job_id, lowest.get((stage, priority), job_id))
    for (stage, priority), job_id in sorted(lowest.items()):  # in one order, so that no two transactions wait
        transaction.session.execute(
            update(QueueMark)
            .where(QueueMark.stage == stage, QueueMark.priority == priority)
            .values(lowest=func.least(QueueMark.lowest, job_id))
            .execution_options(synchronize_session=False)
        )


def _claim_ready(transaction: Transaction, worker: str, lease_s: float, stages: Collection[Stage]) -> Job | None:
    only_encodes = Stage.GENERATE not in stages
    served = tuple(stage for stage in _STAGES_IN_ORDER if stage in stages)
    first = _first_by_level(served) if transaction.is_postgresql else _first_by_stage(served)
    return guarded_update.move(
        transaction,
        states.CLAIM,
        QueueEntry.job_id == first,
        detail={"worker": worker},
        attempt=QueueEntry.attempt + 1,
        attempts_left=QueueEntry.attempts_left - 1,
        worker=worker,
        lease_token=uuid.uuid4(),
        lease_until=transaction.now + timedelta(seconds=lease_s),
        started_at=transaction.now,
        embedding_attempt=QueueEntry.attempt + 1 if only_encodes else QueueEntry.embedding_attempt,
        **NO_PROGRESS,
    )


@cache
def _first_by_level(served: tuple[Stage, ...]) -> ScalarSelect[uuid.UUID]:
    """Select and lock the first ready job."""
    level, ready = _ready_by_level(served)
    first = ready.limit(1).with_for_update(skip_locked=True).lateral("first")
    return select(first.c.job_id).select_from(level.join(first, true())).limit(1).scalar_subquery()


def _ready_by_level(served: Sequence[Stage]) -> tuple[TableValuedAlias, Select[uuid.UUID]]:
    """Return the levels (priority and stage) in order, and a SELECT of the ready jobs of one, from its mark on.

    The levels are read in the order in which they are listed, and only until a LIMIT of the enclosing SELECT is met.
    """
    priorities = range(HIGHEST_PRIORITY, LOWEST_PRIORITY - 1, -1)
    levels = [(stage, priority) for priority in priorities for stage in served]
    # Arrays rather than VALUES: SQLAlchemy would compile a statement with VALUES again for each claim.
    listed = func.unnest(
        literal([stage for stage, _ in levels], ARRAY(String)),
        literal([priority for _, priority in levels], ARRAY(Integer)),
    )
    level = listed.table_valued(column("stage", String), column("priority", Integer)).render_derived("level")
    mark = (
        select(QueueMark.lowest)
        .where(QueueMark.stage == level.c.stage, QueueMark.priority == level.c.priority)
        .correlate(level)
        .scalar_subquery()
    )
    ready = (
        select(QueueEntry.job_id)
        .where(
            text(READY),
            QueueEntry.stage == level.c.stage,
            QueueEntry.priority == level.c.priority,
            QueueEntry.position >= func.coalesce(mark, literal(FIRST_ID, Uuid)),
        )
        .order_by(QueueEntry.position)
    )
    return level, ready


@cache
def _first_by_stage(served: tuple[Stage, ...]) -> ScalarSelect[uuid.UUID]:
    """Select the first ready job: the best of the first of each stage, which one index lists in order."""
    firsts = [
        select(QueueEntry.job_id, QueueEntry.priority, literal(order).label("stage_order"))
        .where(text(READY), QueueEntry.stage == stage)
        .order_by(QueueEntry.priority.desc(), QueueEntry.position)
        .limit(1)
        .subquery()
        for order, stage in enumerate(served)
    ]
    if len(firsts) == 1:
        return select(firsts[0].c.job_id).scalar_subquery()
    best = union_all(*(select(first) for first in firsts)).subquery()
    return select(best.c.job_id).order_by(best.c.priority.desc(), best.c.stage_order).limit(1).scalar_subquery()


def _first_ready(condition: ColumnElement[bool]) -> Select[uuid.UUID]:
    """Select the first ready job of the mark in the enclosing statement."""
    return (
        select(QueueEntry.job_id)
        .where(text(READY), QueueEntry.stage == QueueMark.stage, QueueEntry.priority == QueueMark.priority, condition)
        .order_by(QueueEntry.position)
        .limit(1)
        .correlate(QueueMark)
    )


def _lock_marks(transaction: Transaction) -> Sequence[QueueMark]:
    """Lock the marks. What the next statement reads then includes every job that lowered one of them."""
    return transaction.session.scalars(select(QueueMark).with_for_update(skip_locked=True)).all()


def _set_marks(transaction: Transaction, locked: Sequence[QueueMark], lowest: ColumnElement[uuid.UUID]) -> None:
    transaction.session.execute(
        update(QueueMark)
        .where(tuple_(QueueMark.stage, QueueMark.priority).in_([(mark.stage, mark.priority) for mark in locked]))
        .values(lowest=lowest)
        .execution_options(synchronize_session=False)
    )
