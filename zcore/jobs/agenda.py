"""What there is to do for maintenance, asked with one statement that reads a few entries of indexes.

Takes a `Transaction`. Writes nothing.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Exists, select
from sqlalchemy.orm import InstrumentedAttribute

from zcore.jobs import claims, leftovers, queries, recovery, sweeps, uploads, webhooks
from zcore.jobs.database import Condition, Transaction
from zcore.jobs.models import Input, Job, Leader, Leftover, LeftoverObject, QueueEntry, Sweep, WebhookEvent


@dataclass(frozen=True, slots=True)
class Agenda:
    """What is due now. `is_leader` is whether the process that asks leads the work that it asks for."""

    is_leader: bool
    lost_jobs: bool
    scheduled_jobs: bool
    unnoticed_jobs: bool
    webhooks: bool
    expired_jobs: bool
    expired_uploads: bool
    leftovers: bool
    leftover_objects: bool
    sweep: bool

    @property
    def superfluous_objects(self) -> bool:
        """Whether objects are to be deleted, those included of what is about to expire."""
        return self.leftovers or self.leftover_objects or self.expired_jobs or self.expired_uploads

    @property
    def needs_storage(self) -> bool:
        """Whether anything is due that lists or deletes objects."""
        return self.superfluous_objects or self.sweep


def ask(transaction: Transaction, work: str, holder: str, overdue_s: float) -> Agenda:
    """Return what is due. A job is unnoticed if no worker was notified of it within the last `overdue_s` seconds."""
    answers = {
        "is_leader": _any(Leader.work, Leader.work == work, Leader.holder == holder),
        "lost_jobs": _any(QueueEntry.job_id, *recovery.is_lost(transaction)),
        "scheduled_jobs": _any(QueueEntry.job_id, *claims.is_due(transaction)),
        "unnoticed_jobs": _any(QueueEntry.job_id, *recovery.is_unnoticed(transaction, overdue_s)),
        "webhooks": _any(WebhookEvent.id, webhooks.is_due(transaction)),
        "expired_jobs": _any(Job.id, *queries.is_past_retention(transaction)),
        "expired_uploads": _any(Input.sha256, uploads.is_past_retention(transaction)),
        "leftovers": _any(Leftover.job_id, leftovers.is_due(transaction, Leftover)),
        "leftover_objects": _any(LeftoverObject.key, leftovers.is_due(transaction, LeftoverObject)),
        "sweep": _any(Sweep.prefix, sweeps.is_due(transaction)),
    }
    row = transaction.session.execute(select(*(answer.label(name) for name, answer in answers.items()))).one()
    return Agenda(**dict(zip(answers, row, strict=True)))


def _any(column: InstrumentedAttribute[Any], *conditions: Condition) -> Exists:
    return select(column).where(*conditions).exists()
