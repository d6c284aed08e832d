"""The list of workers: each reports its presence every few seconds, and is removed after a day without a report.

Used by readiness checks and the admin pages. Claims, leases and rescue do not depend on it.
"""

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from sqlalchemy import ColumnElement, Text, cast, delete, func, select

from zcore.jobs.database import Transaction
from zcore.jobs.models import QueueEntry, Worker
from zcore.jobs.states import State
from zcore.stages import Stage

REPORT_INTERVAL_S = 5.0
PRESENCE_TIMEOUT_S = 20.0


class CacheCounts(Protocol):
    """How many prompts a worker found in its embedding cache since it started, and how many it did not."""

    @property
    def hits(self) -> int: ...

    @property
    def misses(self) -> int: ...


def report(
    transaction: Transaction,
    name: str,
    model: str,
    device: str,
    stages: Collection[Stage] = tuple(Stage),
    cache: CacheCounts | None = None,
) -> None:
    """Record that the worker is present now, serves `stages`, and how its embedding cache does."""
    # A restarted container has the host name and process id, and so the name, of the one before it.
    reported: dict[str, Any] = {
        "model": model,
        "device": device,
        "stages": list(stages),
        "embedding_cache_hits": cache.hits if cache else 0,
        "embedding_cache_misses": cache.misses if cache else 0,
        "seen_at": transaction.time(),
    }
    statement = transaction.insert(Worker).values(name=name, started_at=transaction.time(), **reported)
    transaction.session.execute(statement.on_conflict_do_update(index_elements=[Worker.name], set_=reported))


def remove(transaction: Transaction, name: str) -> None:
    """Remove a worker that has shut down. Does nothing if it is not on the list."""
    transaction.session.execute(delete(Worker).where(Worker.name == name))


def present(transaction: Transaction) -> Sequence[Worker]:
    """Return the workers that reported within the last 20 seconds, the earliest started first."""
    return transaction.session.scalars(select(Worker).where(is_present(transaction)).order_by(Worker.started_at)).all()


def count_present(transaction: Transaction) -> int:
    """Return how many workers `present` would return."""
    return transaction.session.scalar(select(func.count()).select_from(Worker).where(is_present(transaction))) or 0


def count_idle(transaction: Transaction, stage: Stage) -> int:
    """Return how many present workers serve `stage` and have no running job."""
    busy = select(QueueEntry.worker).where(QueueEntry.status == State.RUNNING, QueueEntry.worker.is_not(None))
    idle = (
        select(func.count())
        .select_from(Worker)
        .where(is_present(transaction), cast(Worker.stages, Text).contains(f'"{stage}"'), Worker.name.not_in(busy))
    )
    return transaction.session.scalar(idle) or 0


def is_present(transaction: Transaction) -> ColumnElement[bool]:
    """Return the condition that a worker has reported within the last 20 seconds."""
    return Worker.seen_at >= transaction.time(-PRESENCE_TIMEOUT_S)


def forget_lost(transaction: Transaction) -> None:
    """Delete the workers that have not reported for a day."""
    transaction.session.execute(delete(Worker).where(Worker.seen_at < transaction.time(-86_400)))
