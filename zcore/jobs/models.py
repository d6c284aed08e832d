"""The tables of the durable record, and the CHECK constraints that repeat the law of `states`.

Gives mapped classes. Knows no transition (`lifecycle`) and no question (`queries`). `migrations/` holds the same
tables as Alembic revisions; a test compares the two on SQLite and on PostgreSQL.
"""

import uuid
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from zcore.jobs.states import TERMINAL, State
from zcore.stages import Stage


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC time on every database; SQLite, which has no zones, keeps it naive."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        aware = value.astimezone(UTC)
        return aware.replace(tzinfo=None) if dialect.name == "sqlite" else aware

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


JSON_DOCUMENT = JSON().with_variant(JSONB(), "postgresql")
# SQLite counts rows by itself only where the key is exactly INTEGER.
ROW_NUMBER = BigInteger().with_variant(Integer(), "sqlite")


class Table(DeclarativeBase):
    """Base of the mapped classes; names every constraint, so that migrations can."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def _listed(names: frozenset[State] | tuple[State, ...] | tuple[Stage, ...]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names))


class Job(Table):
    """One submission. The row is the queue: its status, order, lease and attempts decide who works on it."""

    __tablename__ = "jobs"

    id: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True)  # UUIDv7: sorts by time of submission
    owner: Mapped[str] = mapped_column(String(100))
    status: Mapped[str] = mapped_column(String(20))
    priority: Mapped[int] = mapped_column(Integer)
    request: Mapped[dict[str, Any]] = mapped_column(JSON_DOCUMENT)
    prompt: Mapped[str] = mapped_column(Text)
    caller_metadata: Mapped[dict[str, Any]] = mapped_column(JSON_DOCUMENT)
    webhook_url: Mapped[str | None] = mapped_column(Text)
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    fingerprint: Mapped[str] = mapped_column(
        String(64)
    )  # SHA-256 of the body as sent, to tell a repeat from a reuse of the key

    attempt: Mapped[int] = mapped_column(Integer, default=0)
    attempts_left: Mapped[int] = mapped_column(Integer)
    worker: Mapped[str | None] = mapped_column(String(200))
    lease_token: Mapped[uuid.UUID | None] = mapped_column(Uuid)
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    cancel_requested_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    progress_phase: Mapped[str | None] = mapped_column(String(20))
    progress_step: Mapped[int] = mapped_column(Integer, default=0)
    progress_steps: Mapped[int] = mapped_column(Integer, default=0)

    error_code: Mapped[str | None] = mapped_column(String(50))
    error_message: Mapped[str | None] = mapped_column(Text)
    error_retryable: Mapped[bool | None]
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON_DOCUMENT, default=dict)
    engine: Mapped[dict[str, Any]] = mapped_column(JSON_DOCUMENT, default=dict)

    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    available_at: Mapped[datetime] = mapped_column(UtcDateTime)
    announced_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    completed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    stage: Mapped[str] = mapped_column(String(20), server_default=Stage.GENERATE)
    # The attempt that encoded the prompt, or began to; None when no embedding of this job can be in storage.
    embedding_attempt: Mapped[int | None] = mapped_column(Integer)

    outputs: Mapped[list["Output"]] = relationship(order_by="Output.position", lazy="selectin")

    __table_args__ = (
        CheckConstraint(f"status IN ({_listed(tuple(State))})", name="status_known"),
        CheckConstraint(
            "CASE WHEN status = 'running' THEN"
            " lease_token IS NOT NULL AND lease_until IS NOT NULL AND worker IS NOT NULL"
            " ELSE lease_token IS NULL AND lease_until IS NULL END",
            name="running_has_lease",
        ),
        CheckConstraint(f"(status IN ({_listed(TERMINAL)})) = (completed_at IS NOT NULL)", name="ended_has_time"),
        CheckConstraint("(status = 'failed') = (error_code IS NOT NULL)", name="failed_has_error"),
        CheckConstraint("(status IN ('succeeded', 'expired')) = (expires_at IS NOT NULL)", name="pictures_expire"),
        CheckConstraint("attempt >= 0 AND attempts_left >= 0", name="attempts_counted"),
        CheckConstraint(f"stage IN ({_listed(tuple(Stage))})", name="stage_known"),
        CheckConstraint("embedding_attempt BETWEEN 1 AND attempt", name="embedding_has_attempt"),
        # The queue itself: what claim reads, in its order.
        Index(
            "ix_jobs_queue",
            priority.desc(),
            "id",
            postgresql_where=text("status = 'queued'"),
            sqlite_where=text("status = 'queued'"),
        ),
        # The same for a worker that serves one stage: the other's backlog is not read through.
        Index(
            "ix_jobs_stage_queue",
            "stage",
            priority.desc(),
            "id",
            postgresql_where=text("status = 'queued'"),
            sqlite_where=text("status = 'queued'"),
        ),
        Index(
            "ix_jobs_embedding",
            "completed_at",
            postgresql_where=text("completed_at IS NOT NULL AND embedding_attempt IS NOT NULL"),
            sqlite_where=text("completed_at IS NOT NULL AND embedding_attempt IS NOT NULL"),
        ),
        Index(
            "ix_jobs_lease",
            "lease_until",
            postgresql_where=text("status = 'running'"),
            sqlite_where=text("status = 'running'"),
        ),
        Index(
            "ix_jobs_expiry",
            "expires_at",
            postgresql_where=text("status = 'succeeded'"),
            sqlite_where=text("status = 'succeeded'"),
        ),
        UniqueConstraint("owner", "idempotency_key"),
        Index("ix_jobs_status_id", "status", "id"),
        Index("ix_jobs_owner_id", "owner", "id"),
        Index("ix_jobs_owner_status_id", "owner", "status", "id"),
    )


class Output(Table):
    """One stored picture of a job."""

    __tablename__ = "job_outputs"

    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(Integer, primary_key=True)
    key: Mapped[str] = mapped_column(Text)
    format: Mapped[str] = mapped_column(String(10))
    width: Mapped[int] = mapped_column(Integer)
    height: Mapped[int] = mapped_column(Integer)
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    seed: Mapped[int] = mapped_column(BigInteger)


class Event(Table):
    """One line of a job's timeline; written in the transaction of what it tells."""

    __tablename__ = "job_events"

    id: Mapped[int] = mapped_column(ROW_NUMBER, primary_key=True, autoincrement=True)
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    type: Mapped[str] = mapped_column(String(30))
    attempt: Mapped[int] = mapped_column(Integer)
    detail: Mapped[dict[str, Any]] = mapped_column(JSON_DOCUMENT)


class WebhookEvent(Table):
    """One thing a caller has to be told; due while `next_attempt_at` stands, then delivered or dead."""

    __tablename__ = "webhook_events"

    id: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True)  # UUIDv7; the `webhook-id` of every try
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    type: Mapped[str] = mapped_column(String(30))
    url: Mapped[str] = mapped_column(Text)
    snapshot: Mapped[dict[str, Any]] = mapped_column(JSON_DOCUMENT)  # the job as it ended; links are added when sent
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    next_attempt_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    delivered_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    __table_args__ = (
        CheckConstraint("delivered_at IS NULL OR next_attempt_at IS NULL", name="delivered_is_done"),
        Index(
            "ix_webhook_events_due",
            "next_attempt_at",
            postgresql_where=text("next_attempt_at IS NOT NULL"),
            sqlite_where=text("next_attempt_at IS NOT NULL"),
        ),
    )


class WebhookAttempt(Table):
    """One try to deliver a webhook event, as it went."""

    __tablename__ = "webhook_attempts"

    id: Mapped[int] = mapped_column(ROW_NUMBER, primary_key=True, autoincrement=True)
    event_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("webhook_events.id", ondelete="CASCADE"), index=True)
    number: Mapped[int] = mapped_column(Integer)
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    duration_ms: Mapped[int] = mapped_column(Integer)
    status_code: Mapped[int | None] = mapped_column(Integer)
    answer: Mapped[str] = mapped_column(Text)  # the first bytes of the answer, or why there was none


class Input(Table):
    """One picture that a caller uploaded; its bytes lie in storage until some time after `expires_at`."""

    __tablename__ = "inputs"

    owner: Mapped[str] = mapped_column(String(100), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    format: Mapped[str] = mapped_column(String(10))
    width: Mapped[int] = mapped_column(Integer)
    height: Mapped[int] = mapped_column(Integer)
    bytes: Mapped[int] = mapped_column(BigInteger)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)


class Worker(Table):
    """One worker, as long as it shows itself. For people and readiness; no decision about a job rests on it."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    model: Mapped[str] = mapped_column(Text)
    device: Mapped[str] = mapped_column(String(100))
    started_at: Mapped[datetime] = mapped_column(UtcDateTime)
    seen_at: Mapped[datetime] = mapped_column(UtcDateTime)
    stages: Mapped[list[str]] = mapped_column(JSON_DOCUMENT)  # what it serves
