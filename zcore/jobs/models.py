"""The tables of jobs, with CHECK constraints that repeat the transition table of `states`.

`migrations/` defines the same tables as Alembic revisions; a test compares the two on SQLite and on PostgreSQL.
"""

import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, get_args

import msgspec
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    DateTime,
    Dialect,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Text,
    TypeDecorator,
    Uuid,
    column,
    table,
    text,
    true,
)
from sqlalchemy.dialects.postgresql import JSONB, TSVECTOR
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.sql.operators import OperatorType
from sqlalchemy.types import TypeEngine

from zcore.jobs.states import ACTIVE, TERMINAL, State
from zcore.request import GenerationRequest
from zcore.stages import Stage


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC time on every database. SQLite has no time zones and stores it naive."""

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


class StoredRequest(TypeDecorator[dict[str, Any]]):
    """A `GenerationRequest` as a document, complete but for what is null.

    A field that may be null and is absent is null, whatever its default has become since, so a stored request never
    changes its meaning. Leaving these fields out saves a fifth of a request without images or guidance.
    """

    impl = JSON
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(JSON_DOCUMENT)

    def coerce_compared_value(self, op: OperatorType | None, value: Any) -> TypeEngine[Any]:
        return self.impl_instance.coerce_compared_value(op, value)

    def process_bind_param(self, value: dict[str, Any] | None, dialect: Dialect) -> dict[str, Any] | None:
        if value is None:
            return None
        return {name: part for name, part in value.items() if part is not None or name not in NULLABLE_FIELDS}

    def process_result_value(self, value: dict[str, Any] | None, dialect: Dialect) -> dict[str, Any] | None:
        return None if value is None else {**dict.fromkeys(NULLABLE_FIELDS), **value}


NULLABLE_FIELDS = tuple(
    field.name for field in msgspec.structs.fields(GenerationRequest) if type(None) in get_args(field.type)
)
"""The fields of a request that may be null."""
ONLY_ON = "only_on"
"""Key of the `info` of a table that exists on one kind of database only."""
JSON_DOCUMENT = JSON().with_variant(JSONB(), "postgresql")
READY = "status = 'queued' AND NOT scheduled"
"""Condition of a queue entry that a worker may claim, as the partial index has it."""
BY_JOB = {"postgresql_partition_by": "RANGE (job_id)"}
"""Options of a table whose rows belong to jobs: on PostgreSQL it has a partition for each week of submission."""


class Table(DeclarativeBase):
    """Base of the mapped classes. Names every constraint, so that migrations can refer to it."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def _listed(names: Iterable[State | Stage]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names))


class QueueEntry(Table):
    """The place of an active job in the queue: order, attempts, lease and progress.

    There is one exactly while the job is QUEUED or RUNNING. Heartbeats change only columns without an index, so that
    PostgreSQL stores them within the page (HOT).
    """

    __tablename__ = "queue"

    job_id: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True)
    owner: Mapped[str] = mapped_column(String(100))
    status: Mapped[str] = mapped_column(String(20))
    stage: Mapped[str] = mapped_column(String(20))
    priority: Mapped[int] = mapped_column(Integer)
    # Order within the priority: the job's id. A column of its own, because PostgreSQL would otherwise look for the
    # first job of a priority along the primary key, past all jobs of the others.
    position: Mapped[uuid.UUID] = mapped_column(Uuid)
    scheduled: Mapped[bool] = mapped_column(Boolean)  # not due yet; `claims.promote` makes it ready
    available_at: Mapped[datetime] = mapped_column(UtcDateTime)
    notified_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    attempt: Mapped[int] = mapped_column(Integer)
    attempts_left: Mapped[int] = mapped_column(Integer)
    # Its worker was lost once: it runs alone, so that it can take no other job with it.
    isolated: Mapped[bool] = mapped_column(Boolean)
    # The attempt that encoded the prompt, or began to; None if no embedding of this job can be in storage.
    embedding_attempt: Mapped[int | None] = mapped_column(Integer)

    worker: Mapped[str | None] = mapped_column(String(200))
    lease_token: Mapped[uuid.UUID | None] = mapped_column(Uuid)
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    cancel_requested_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    # What heartbeats change comes last: PostgreSQL then logs only these bytes.
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    progress_phase: Mapped[str | None] = mapped_column(String(20))
    progress_step: Mapped[int] = mapped_column(Integer)
    progress_steps: Mapped[int] = mapped_column(Integer)

    __table_args__ = (
        CheckConstraint(f"status IN ({_listed(ACTIVE)})", name="status_known"),
        CheckConstraint(f"stage IN ({_listed(tuple(Stage))})", name="stage_known"),
        CheckConstraint(
            "CASE WHEN status = 'running' THEN"
            " lease_token IS NOT NULL AND lease_until IS NOT NULL AND worker IS NOT NULL"
            " ELSE lease_token IS NULL AND lease_until IS NULL END",
            name="running_has_lease",
        ),
        CheckConstraint("status = 'queued' OR NOT scheduled", name="scheduled_is_queued"),
        CheckConstraint("status = 'running' OR cancel_requested_at IS NULL", name="canceled_is_running"),
        CheckConstraint("attempt >= 0 AND attempts_left >= 0", name="attempts_counted"),
        CheckConstraint("embedding_attempt BETWEEN 1 AND attempt", name="embedding_has_attempt"),
        # The ready jobs of a stage in the order in which they are claimed.
        Index(
            "ix_queue_ready",
            "stage",
            priority.desc(),
            "position",
            postgresql_where=text(READY),
            sqlite_where=text(READY),
        ),
        Index(
            "ix_queue_scheduled",
            "available_at",
            postgresql_where=text("scheduled"),
            sqlite_where=text("scheduled"),
        ),
        Index(
            "ix_queue_running",
            "job_id",
            postgresql_where=text("status = 'running'"),
            sqlite_where=text("status = 'running'"),
        ),
        # Half of each page is left free for new versions of its rows.
        {"postgresql_with": {"fillfactor": 50, "autovacuum_vacuum_scale_factor": 0.01}},
    )


class Job(Table):
    """A submission and how it ended.

    The row is written twice: at submission, and when the job ends. In between, the queue entry has what changes; the
    properties read it from there while there is an entry, and otherwise the facts of the last attempt.
    """

    __tablename__ = "jobs"

    id: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True)  # UUIDv7: sorts by time of submission
    owner: Mapped[str] = mapped_column(String(100))
    priority: Mapped[int] = mapped_column(Integer)
    request: Mapped[dict[str, Any]] = mapped_column(StoredRequest)
    caller_metadata: Mapped[dict[str, Any]] = mapped_column(JSON_DOCUMENT)
    webhook_url: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)

    # QUEUED from the submission to the end: the job has a queue entry, which says whether it is running.
    stored_status: Mapped[str] = mapped_column("status", String(20))
    completed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    error_code: Mapped[str | None] = mapped_column(String(50))
    error_message: Mapped[str | None] = mapped_column(Text)
    error_retryable: Mapped[bool | None]
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON_DOCUMENT, default=dict)
    engine: Mapped[dict[str, Any]] = mapped_column(JSON_DOCUMENT, default=dict)
    # Facts of the last attempt, copied from the queue entry when the job ends.
    last_attempt: Mapped[int | None] = mapped_column("attempt", Integer)
    last_worker: Mapped[str | None] = mapped_column("worker", String(200))
    last_started_at: Mapped[datetime | None] = mapped_column("started_at", UtcDateTime)
    last_stage: Mapped[str | None] = mapped_column("stage", String(20))
    last_embedding_attempt: Mapped[int | None] = mapped_column("embedding_attempt", Integer)
    last_cancel_requested_at: Mapped[datetime | None] = mapped_column("cancel_requested_at", UtcDateTime)

    entry: Mapped[QueueEntry | None] = relationship(
        primaryjoin="foreign(QueueEntry.job_id) == Job.id", viewonly=True, uselist=False, lazy="joined"
    )
    outputs: Mapped[list["Output"]] = relationship(
        primaryjoin="foreign(Output.job_id) == Job.id", order_by="Output.position", lazy="selectin"
    )

    __table_args__ = (
        CheckConstraint(f"status IN ({_listed((State.QUEUED, *TERMINAL))})", name="status_known"),
        CheckConstraint(f"(status IN ({_listed(TERMINAL)})) = (completed_at IS NOT NULL)", name="ended_has_time"),
        CheckConstraint("status = 'queued' OR attempt IS NOT NULL AND stage IS NOT NULL", name="ended_has_attempt"),
        CheckConstraint("(status = 'failed') = (error_code IS NOT NULL)", name="failed_has_error"),
        CheckConstraint("(status IN ('succeeded', 'expired')) = (expires_at IS NOT NULL)", name="outputs_expire"),
        CheckConstraint(f"stage IN ({_listed(tuple(Stage))})", name="stage_known"),
        CheckConstraint("embedding_attempt BETWEEN 1 AND attempt", name="embedding_has_attempt"),
        Index(
            "ix_jobs_expiry",
            "expires_at",
            postgresql_where=text("status = 'succeeded'"),
            sqlite_where=text("status = 'succeeded'"),
        ),
        Index("ix_jobs_status_id", "status", "id"),
        Index("ix_jobs_owner_id", "owner", "id"),
        Index("ix_jobs_owner_status_id", "owner", "status", "id"),
        {"postgresql_partition_by": "RANGE (id)"},
    )

    @property
    def status(self) -> str:
        """State of the job."""
        return self.entry.status if self.entry else self.stored_status

    @property
    def prompt(self) -> str:
        """Prompt of the request."""
        return str(self.request["prompt"])

    @property
    def stage(self) -> str:
        """Stage in progress or the next one; after the end, the last one."""
        return self.entry.stage if self.entry else self.last_stage or Stage.GENERATE

    @property
    def attempt(self) -> int:
        """Number of attempts that have begun."""
        return self.entry.attempt if self.entry else self.last_attempt or 0

    @property
    def attempts_left(self) -> int:
        """Number of attempts that may still begin; 0 after the end."""
        return self.entry.attempts_left if self.entry else 0

    @property
    def isolated(self) -> bool:
        """Whether its worker must run no other job beside it."""
        return self.entry is not None and self.entry.isolated

    @property
    def embedding_attempt(self) -> int | None:
        """Attempt whose embedding of the prompt may be in storage."""
        return self.entry.embedding_attempt if self.entry else self.last_embedding_attempt

    @property
    def worker(self) -> str | None:
        """Worker of the last attempt."""
        return self.entry.worker if self.entry else self.last_worker

    @property
    def started_at(self) -> datetime | None:
        """Time at which the last attempt began."""
        return self.entry.started_at if self.entry else self.last_started_at

    @property
    def cancel_requested_at(self) -> datetime | None:
        """Time at which cancellation was requested."""
        return self.entry.cancel_requested_at if self.entry else self.last_cancel_requested_at

    @property
    def available_at(self) -> datetime | None:
        """Time from which the job may be claimed; None after the end."""
        return self.entry.available_at if self.entry else None

    @property
    def notified_at(self) -> datetime | None:
        """Time at which a worker was last notified; None after the end."""
        return self.entry.notified_at if self.entry else None

    @property
    def lease_token(self) -> uuid.UUID | None:
        """Token of the lease of a running job."""
        return self.entry.lease_token if self.entry else None

    @property
    def lease_until(self) -> datetime | None:
        """Time at which the lease of a running job expires."""
        return self.entry.lease_until if self.entry else None

    @property
    def progress_phase(self) -> str | None:
        """Phase of a running job."""
        return self.entry.progress_phase if self.entry else None

    @property
    def progress_step(self) -> int:
        """Steps that a running job has done."""
        return self.entry.progress_step if self.entry else 0

    @property
    def progress_steps(self) -> int:
        """Steps of a running job; 0 if they are not known."""
        return self.entry.progress_steps if self.entry else 0


class IdempotencyKey(Table):
    """The job that a caller created with a key, for 24 hours."""

    __tablename__ = "idempotency_keys"

    owner: Mapped[str] = mapped_column(String(100), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    job_id: Mapped[uuid.UUID] = mapped_column(Uuid)
    # SHA-256 of the body as sent: distinguishes a repeated request from a reused key.
    fingerprint: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)


class QueueMark(Table):
    """Lower bound of the ids of the ready jobs of one stage and priority.

    Claims on PostgreSQL begin there, and so do not read the index entries of jobs that have left the queue.
    """

    __tablename__ = "queue_marks"

    stage: Mapped[str] = mapped_column(String(20), primary_key=True)
    priority: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    lowest: Mapped[uuid.UUID] = mapped_column(Uuid)

    __table_args__ = ({"postgresql_with": {"fillfactor": 50}},)


class Leftover(Table):
    """An ended or expired job of whose attempts objects may be in storage that belong to no row."""

    __tablename__ = "leftovers"

    job_id: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True)
    attempts: Mapped[int] = mapped_column(Integer)  # the attempts 1 to this one
    retained_attempt: Mapped[int | None] = mapped_column(Integer)  # its images are the job's outputs
    images: Mapped[int] = mapped_column(Integer)
    format: Mapped[str] = mapped_column(String(10))
    due_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
    tries: Mapped[int] = mapped_column(Integer, server_default="0")  # how often deletion has begun


class LeftoverObject(Table):
    """An object in storage that belongs to no row any more, such as an expired upload."""

    __tablename__ = "leftover_objects"

    key: Mapped[str] = mapped_column(Text, primary_key=True)
    due_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
    tries: Mapped[int] = mapped_column(Integer, server_default="0")  # how often deletion has begun


class Output(Table):
    """A stored image of a job."""

    __tablename__ = "job_outputs"

    job_id: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True)
    position: Mapped[int] = mapped_column(Integer, primary_key=True)
    key: Mapped[str] = mapped_column(Text)
    format: Mapped[str] = mapped_column(String(10))
    width: Mapped[int] = mapped_column(Integer)
    height: Mapped[int] = mapped_column(Integer)
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    seed: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = (BY_JOB,)


class Event(Table):
    """An event on a job's timeline, added in the transaction that made the change."""

    __tablename__ = "job_events"

    id: Mapped[int] = mapped_column(BigInteger, autoincrement=False)  # the order of the events of a job
    job_id: Mapped[uuid.UUID] = mapped_column(Uuid)
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    type: Mapped[str] = mapped_column(String(30))
    attempt: Mapped[int] = mapped_column(Integer)
    detail: Mapped[dict[str, Any]] = mapped_column(JSON_DOCUMENT)

    __table_args__ = (PrimaryKeyConstraint("job_id", "id"), BY_JOB)


class WebhookEvent(Table):
    """A notification to a caller's webhook: due at `next_attempt_at`; delivered or given up if that is NULL."""

    __tablename__ = "webhook_events"

    id: Mapped[uuid.UUID] = mapped_column(Uuid)  # UUIDv7; the `webhook-id` of every attempt
    job_id: Mapped[uuid.UUID] = mapped_column(Uuid)
    type: Mapped[str] = mapped_column(String(30))
    url: Mapped[str] = mapped_column(Text)
    snapshot: Mapped[dict[str, Any]] = mapped_column(JSON_DOCUMENT)  # the job at its end; links are added on delivery
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    next_attempt_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    delivered_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    __table_args__ = (
        PrimaryKeyConstraint("job_id", "id"),
        CheckConstraint("delivered_at IS NULL OR next_attempt_at IS NULL", name="delivered_is_done"),
        Index(
            "ix_webhook_events_due",
            "next_attempt_at",
            postgresql_where=text("next_attempt_at IS NOT NULL"),
            sqlite_where=text("next_attempt_at IS NOT NULL"),
        ),
        BY_JOB,
    )


class WebhookAttempt(Table):
    """An attempt to deliver a webhook event, and its result."""

    __tablename__ = "webhook_attempts"

    id: Mapped[int] = mapped_column(BigInteger, autoincrement=False)  # the order of the attempts of a job
    job_id: Mapped[uuid.UUID] = mapped_column(Uuid)
    event_id: Mapped[uuid.UUID] = mapped_column(Uuid)
    number: Mapped[int] = mapped_column(Integer)
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    duration_ms: Mapped[int] = mapped_column(Integer)
    status_code: Mapped[int | None] = mapped_column(Integer)
    response_body: Mapped[str] = mapped_column(Text)  # the beginning of the response, or why there was none

    __table_args__ = (PrimaryKeyConstraint("job_id", "id"), BY_JOB)


class SearchTerms(Table):
    """The terms by which a job is found on PostgreSQL; never changed, so that its index is written once."""

    __tablename__ = "search_terms"

    job_id: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True)
    terms: Mapped[str] = mapped_column(TSVECTOR)

    __table_args__ = (
        Index("ix_search_terms_terms", "terms", postgresql_using="gin"),
        {"info": {ONLY_ON: "postgresql"}},
    )


class SearchNumber(Table):
    """The number of a job in `search_index` on SQLite, whose rows have integers for keys."""

    __tablename__ = "search_numbers"

    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    job_id: Mapped[uuid.UUID] = mapped_column(Uuid, unique=True)

    __table_args__ = ({"info": {ONLY_ON: "sqlite"}},)


SEARCH_INDEX = table("search_index", column("rowid", Integer), column("terms", Text))
"""The terms of the jobs on SQLite. The mapping does not know virtual tables, so the migration creates it."""


class Input(Table):
    """An image that a caller uploaded. Its bytes are in storage from `stored_at` for as long as there is a row."""

    __tablename__ = "inputs"

    owner: Mapped[str] = mapped_column(String(100), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    format: Mapped[str] = mapped_column(String(10))
    width: Mapped[int] = mapped_column(Integer)
    height: Mapped[int] = mapped_column(Integer)
    bytes: Mapped[int] = mapped_column(BigInteger)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
    storage_key: Mapped[str] = mapped_column(String(200), unique=True, index=True)
    stored_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # None until storage has the bytes


class Lora(Table):
    """A LoRA that the operator registered. Its file is in storage under `storage_key`.

    Unless `strict`, the tensors of the file that do not fit the model are left out, instead of the file refused.
    """

    __tablename__ = "loras"

    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64))
    licence: Mapped[str] = mapped_column(Text)
    storage_key: Mapped[str] = mapped_column(String(200))
    bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    strict: Mapped[bool] = mapped_column(Boolean, server_default=true())


class Worker(Table):
    """A worker that reports its presence. Used by readiness checks and admin pages; no job depends on it."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    model: Mapped[str] = mapped_column(Text)
    device: Mapped[str] = mapped_column(String(100))
    started_at: Mapped[datetime] = mapped_column(UtcDateTime)
    seen_at: Mapped[datetime] = mapped_column(UtcDateTime)
    stages: Mapped[list[str]] = mapped_column(JSON_DOCUMENT)  # the stages it serves
    embedding_cache_hits: Mapped[int] = mapped_column(Integer, server_default="0")  # since it started
    embedding_cache_misses: Mapped[int] = mapped_column(Integer, server_default="0")

    # Every worker reports every few seconds. Half of each page is left free for new versions of its rows.
    __table_args__ = ({"postgresql_with": {"fillfactor": 50}},)


class Leader(Table):
    """The process that leads a kind of work that only one process does, until its term ends or is renewed."""

    __tablename__ = "leaders"

    work: Mapped[str] = mapped_column(String(50), primary_key=True)
    holder: Mapped[str] = mapped_column(String(300))
    until: Mapped[datetime] = mapped_column(UtcDateTime)


class Sweep(Table):
    """How far the comparison of the objects in storage with the rows has come."""

    __tablename__ = "sweeps"

    prefix: Mapped[str] = mapped_column(String(50), primary_key=True)
    after: Mapped[str] = mapped_column(Text)  # the key that was compared last; empty at the beginning of a round
    due_at: Mapped[datetime] = mapped_column(UtcDateTime)


class AdminSession(Table):
    """An open session of the admin pages."""

    __tablename__ = "admin_sessions"

    id: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True)
    ends_at: Mapped[datetime] = mapped_column(UtcDateTime)
