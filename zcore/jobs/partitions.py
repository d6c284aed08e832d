"""The partitions of the tables whose rows belong to jobs: one for each week of submission, on PostgreSQL only.

Takes a `Transaction`. Weeks begin on Monday, in UTC. Days would be too many: a statement that is not about one job,
such as a list, is planned for every partition and locks each. The first partition has what there was before the tables
were partitioned, and the last one has no end: so every new job has a partition, even if maintenance makes none for a
long time. There is no DEFAULT partition, beside which PostgreSQL could not list jobs in order without merging.

Partitions are made and dropped under a lock that every other transaction waits for. So these transactions are short,
and give up soon: beside a backup, which reads all tables, they fail until it ends. Does not commit.
"""

import re
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise

from sqlalchemy import ColumnElement, select, text
from sqlalchemy.orm import InstrumentedAttribute

from zcore.jobs.database import Limits, Transaction
from zcore.jobs.ids import first_id_at
from zcore.jobs.models import Event, Job, Leftover, Output, WebhookAttempt, WebhookEvent
from zcore.jobs.states import State

KEYS = {
    table.__tablename__: "id" if table is Job else "job_id"
    for table in (WebhookAttempt, WebhookEvent, Event, Output, Job)
}
"""The partitioned tables and the columns that they are partitioned by; `jobs` comes last, as when they are dropped."""
WEEKS_AHEAD = 2
LIMITS = Limits(lock_s=0.2)
"""Limits of a transaction that locks the tables: what waits behind it waits no longer than this."""
PATIENT_LIMITS = Limits(lock_s=0.2, statement_s=600, answer_s=610, transaction_s=700)
"""Limits of one that reads a whole partition."""
BOUND = "ck_is_bounded"
"""Name of the CHECK constraint by which PostgreSQL knows, without reading them, that the rows are below a bound."""

_RANGE = re.compile(r"FOR VALUES FROM \((.+)\) TO \((.+)\)")


@dataclass(frozen=True, slots=True)
class Partition:
    """The jobs from `lowest` to below `end`, None being no bound. `name` ends the names of its tables."""

    name: str
    lowest: uuid.UUID | None
    end: uuid.UUID | None


def begin_of_week(moment: datetime) -> datetime:
    """Return when the week of that time began."""
    day = moment.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return day - timedelta(days=day.weekday())


def find_all(transaction: Transaction) -> list[Partition]:
    """Return the partitions, the oldest first; none on SQLite."""
    if not transaction.is_postgresql:
        return []
    rows = transaction.session.execute(
        text(
            "SELECT relname, pg_get_expr(relpartbound, pg_class.oid)"
            " FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid WHERE inhparent = 'jobs'::regclass"
        )
    )
    found = [_partition(name, bounds) for name, bounds in rows]
    return sorted(found, key=lambda one: one.lowest.int if one.lowest else -1)


def add_weeks(transaction: Transaction) -> bool:
    """Make the partitions of the next two weeks, if they are missing.

    Returns False, having made none, if the last partition is in use, because maintenance was away for as long:
    `bound_last` is called then. Locks the tables; begin with `LIMITS`.
    """
    begin = _begin_of_last(transaction)
    if begin is None or begin >= _first_id(transaction, WEEKS_AHEAD + 1):
        return True
    _lock_all(transaction)
    if any(transaction.session.scalar(text(f"SELECT EXISTS (SELECT FROM {table}_last)")) for table in KEYS):
        return False
    weeks = (_first_id(transaction, ahead) for ahead in range(WEEKS_AHEAD + 2))
    bounds = [begin, *(week for week in weeks if week > begin)]
    for table in KEYS:
        transaction.session.execute(text(f"DROP TABLE {table}_last"))
        for lowest, end in pairwise(bounds):
            _create(transaction, table, _week_name(lowest), lowest, f"'{end}'")
        _create(transaction, table, "last", bounds[-1], "MAXVALUE")
    return True


def add_bound(transaction: Transaction) -> None:
    """Have PostgreSQL check that what is added to the last partition is not of a later time than the next two weeks."""
    begin = _begin_of_last(transaction)
    if begin is None:
        return
    remove_bound(transaction)  # of a process that was killed
    end = _first_id(transaction, WEEKS_AHEAD + 1)
    for table, key in KEYS.items():
        rule = f"CHECK ({key} >= '{begin}' AND {key} < '{end}') NOT VALID"
        transaction.session.execute(text(f"ALTER TABLE {table}_last ADD CONSTRAINT {BOUND} {rule}"))


def verify_bound(transaction: Transaction, table: str) -> None:
    """Read the whole last partition of a table, and raise `DatabaseError` if a row lies beyond the bound.

    Others read and write meanwhile. Begin with `PATIENT_LIMITS`.
    """
    transaction.session.execute(text(f"ALTER TABLE {table}_last VALIDATE CONSTRAINT {BOUND}"))


def remove_bound(transaction: Transaction) -> None:
    """Undo `add_bound`, if it was done."""
    for table in KEYS:
        transaction.session.execute(text(f"ALTER TABLE IF EXISTS {table}_last DROP CONSTRAINT IF EXISTS {BOUND}"))


def bound_last(transaction: Transaction) -> None:
    """Make the last partition, whose bound is verified, one of several weeks, and begin another last one."""
    begin = _begin_of_last(transaction)
    if begin is None:
        return
    _lock_all(transaction)
    end = _first_id(transaction, WEEKS_AHEAD + 1)
    for table in KEYS:
        name = f"{table}_{_week_name(begin)}"
        for statement in (
            f"ALTER TABLE {table} DETACH PARTITION {table}_last",
            f"ALTER TABLE {table}_last RENAME TO {name}",
            f"ALTER TABLE {table} ATTACH PARTITION {name} FOR VALUES FROM ('{begin}') TO ('{end}')",
            f"ALTER TABLE {name} DROP CONSTRAINT {BOUND}",
        ):
            transaction.session.execute(text(statement))
        _create(transaction, table, "last", end, "MAXVALUE")


def drop(transaction: Transaction, partition: Partition, ended_before: datetime) -> bool:
    """Drop a partition if nothing remains to be done for any of its jobs, and all had ended before that time.

    Returns whether it was dropped. Begin with `PATIENT_LIMITS`.
    """
    # Nobody retries a job or sends a webhook again between the question and the deletion.
    lock = f"LOCK TABLE jobs_{partition.name}, webhook_events_{partition.name} IN SHARE MODE"
    transaction.session.execute(text(lock))
    if _is_needed(transaction, partition, ended_before):
        return False
    names = ", ".join(f"{table}_{partition.name}" for table in KEYS)
    transaction.session.execute(text(f"DROP TABLE {names}"))
    return True


def gaps(found: list[Partition]) -> list[Partition]:
    """Return the ranges of ids before and between the partitions, of which there are no jobs any more."""
    bounds = [Partition("", None, None if not found else found[0].lowest)]
    bounds += [Partition("", before.end, after.lowest) for before, after in pairwise(found)]
    return [gap for gap in bounds if gap.end is not None and gap.end != gap.lowest]


def within(column: InstrumentedAttribute[uuid.UUID], partition: Partition) -> list[ColumnElement[bool]]:
    """Return the conditions that the column is in the range of a partition."""
    above = [] if partition.lowest is None else [column >= partition.lowest]
    return above if partition.end is None else [*above, column < partition.end]


def _is_needed(transaction: Transaction, partition: Partition, ended_before: datetime) -> bool:
    """Return whether any of the jobs has to stay. Asks what indexes know first; the last question reads every row."""
    jobs = select(Job.id).where(*within(Job.id, partition))
    return any(
        transaction.session.scalar(select(found.exists()))
        for found in (
            jobs.where(Job.stored_status == State.QUEUED),
            jobs.where(Job.stored_status == State.SUCCEEDED),
            select(Leftover.job_id).where(*within(Leftover.job_id, partition)),
            select(WebhookEvent.id).where(
                *within(WebhookEvent.job_id, partition), WebhookEvent.next_attempt_at.is_not(None)
            ),
            jobs.where(Job.completed_at >= ended_before),
        )
    )


def _begin_of_last(transaction: Transaction) -> uuid.UUID | None:
    """Return the lowest id of the last partition; None on SQLite."""
    found = find_all(transaction)
    return found[-1].lowest if found else None


def _lock_all(transaction: Transaction) -> None:
    for table in KEYS:
        transaction.session.execute(text(f"LOCK TABLE ONLY {table} IN ACCESS EXCLUSIVE MODE"))


def _create(transaction: Transaction, table: str, name: str, lowest: uuid.UUID, end: str) -> None:
    bounds = f"FOR VALUES FROM ('{lowest}') TO ({end})"
    transaction.session.execute(text(f"CREATE TABLE {table}_{name} PARTITION OF {table} {bounds}"))


def _first_id(transaction: Transaction, weeks_ahead: int) -> uuid.UUID:
    """Return the lowest id of the jobs that are submitted that many weeks after this one."""
    return first_id_at(begin_of_week(transaction.now) + timedelta(weeks=weeks_ahead))


def _week_name(lowest: uuid.UUID) -> str:
    """Return the name of the partition that begins with this id."""
    return f"{datetime.fromtimestamp((lowest.int >> 80) / 1000, UTC):%Y%m%d}"


def _partition(table: str, bounds: str) -> Partition:
    found = _RANGE.fullmatch(bounds)
    assert found is not None, bounds
    lowest, end = (None if bound.endswith("VALUE") else uuid.UUID(bound.strip("'")) for bound in found.groups())
    return Partition(table.removeprefix("jobs_"), lowest, end)
