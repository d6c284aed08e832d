"""Which workers are there: each shows itself every few seconds and is forgotten when it no longer does.

For readiness and for people. Claims, leases and rescue do not look at it.
"""

from collections.abc import Collection, Sequence
from datetime import timedelta

from sqlalchemy import delete, select

from zcore.jobs.database import Transaction
from zcore.jobs.models import Worker
from zcore.stages import Stage

SHOWN_EVERY_S = 5.0
PRESENT_FOR_S = 20.0


def show(
    transaction: Transaction, name: str, model: str, device: str, stages: Collection[Stage] = tuple(Stage)
) -> None:
    """The worker is there now, and serves `stages`."""
    worker = transaction.session.get(Worker, name)
    if worker is None:
        worker = Worker(name=name, model=model, device=device, stages=list(stages), started_at=transaction.now)
        transaction.session.add(worker)
    worker.seen_at = transaction.now


def leave(transaction: Transaction, name: str) -> None:
    """The worker ended as it should."""
    transaction.session.execute(delete(Worker).where(Worker.name == name))


def present(transaction: Transaction) -> Sequence[Worker]:
    """Workers seen in the last 20 seconds, the longest-serving first."""
    since = transaction.now - timedelta(seconds=PRESENT_FOR_S)
    return transaction.session.scalars(select(Worker).where(Worker.seen_at >= since).order_by(Worker.started_at)).all()


def forget_lost(transaction: Transaction) -> None:
    """Workers not seen for a day are deleted."""
    transaction.session.execute(delete(Worker).where(Worker.seen_at < transaction.now - timedelta(days=1)))
