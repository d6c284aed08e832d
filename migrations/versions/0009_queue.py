"""What changes often moves from jobs to a narrow queue; keys and leftover objects get tables of their own."""

from collections.abc import Sequence
from uuid import UUID

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0009"
down_revision: str | None = "0008"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

DOCUMENT = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
TIME = sa.DateTime(timezone=True)
QUEUED, SUCCEEDED, RUNNING = (sa.text(f"status = '{status}'") for status in ("queued", "succeeded", "running"))
READY, SCHEDULED = sa.text("status = 'queued' AND NOT scheduled"), sa.text("scheduled")
PRIORITY: sa.ColumnElement[object] = sa.literal_column("priority DESC")
CHILDREN = ("job_outputs", "job_events", "webhook_events")
LEASE = (
    "CASE WHEN status = 'running' THEN lease_token IS NOT NULL AND lease_until IS NOT NULL AND worker IS NOT NULL"
    " ELSE lease_token IS NULL AND lease_until IS NULL END"
)
ENDED = "status IN ('canceled', 'expired', 'failed', 'succeeded')"

TO_QUEUE = """
INSERT INTO queue (job_id, owner, status, stage, priority, position, scheduled, available_at, notified_at, attempt,
                   attempts_left, isolated, embedding_attempt, worker, lease_token, started_at, cancel_requested_at,
                   lease_until, progress_phase, progress_step, progress_steps)
SELECT id, owner, status, stage, priority, id, status = 'queued' AND available_at > CURRENT_TIMESTAMP, available_at,
       notified_at, attempt, attempts_left, false, embedding_attempt, worker, lease_token, started_at,
       cancel_requested_at, lease_until, progress_phase, progress_step, progress_steps
FROM jobs_before WHERE status IN ('queued', 'running')
"""
TO_KEYS = """
INSERT INTO idempotency_keys (owner, key, job_id, fingerprint, created_at)
SELECT owner, idempotency_key, id, fingerprint, created_at FROM jobs_before WHERE idempotency_key IS NOT NULL
"""
TO_LEFTOVERS = """
INSERT INTO leftovers (job_id, attempts, retained_attempt, images, format, due_at)
SELECT id, attempt, CASE WHEN status IN ('succeeded', 'expired') THEN attempt END,
       coalesce(CAST(request ->> 'n' AS INTEGER), 1), coalesce(request ->> 'format', 'png'), CURRENT_TIMESTAMP
FROM jobs_before
WHERE completed_at IS NOT NULL AND (
    attempt > 1 OR attempt = 1 AND status NOT IN ('succeeded', 'expired') OR embedding_attempt IS NOT NULL)
"""
TO_JOBS = """
INSERT INTO jobs (id, owner, priority, request, caller_metadata, webhook_url, created_at, status, completed_at,
                  expires_at, error_code, error_message, error_retryable, metrics, engine, attempt, worker, started_at,
                  stage, embedding_attempt, cancel_requested_at)
SELECT id, owner, priority, request, caller_metadata, webhook_url, created_at,
       CASE status WHEN 'running' THEN 'queued' ELSE status END, completed_at, expires_at, error_code, error_message,
       error_retryable, metrics, engine, attempt, worker, started_at, stage, embedding_attempt, cancel_requested_at
FROM jobs_before
"""
FROM_ALL = """
INSERT INTO jobs (id, owner, status, priority, request, prompt, caller_metadata, webhook_url, idempotency_key,
                  fingerprint, attempt, attempts_left, worker, lease_token, lease_until, cancel_requested_at,
                  progress_phase, progress_step, progress_steps, error_code, error_message, error_retryable, metrics,
                  engine, created_at, available_at, notified_at, started_at, completed_at, expires_at, stage,
                  embedding_attempt)
SELECT job.id, job.owner, coalesce(entry.status, job.status), job.priority, request, request ->> 'prompt',
       caller_metadata, webhook_url, key, coalesce(fingerprint, ''), coalesce(entry.attempt, job.attempt, 0),
       coalesce(attempts_left, 0), coalesce(entry.worker, job.worker), lease_token, lease_until,
       CASE WHEN entry.job_id IS NULL THEN job.cancel_requested_at ELSE entry.cancel_requested_at END, progress_phase,
       coalesce(progress_step, 0), coalesce(progress_steps, 0), error_code, error_message, error_retryable, metrics,
       engine, job.created_at, coalesce(available_at, job.created_at), notified_at,
       coalesce(entry.started_at, job.started_at), completed_at, expires_at,
       coalesce(entry.stage, job.stage, 'generate'),
       CASE WHEN leftovers.job_id IS NULL THEN entry.embedding_attempt ELSE job.embedding_attempt END
FROM jobs_before AS job
LEFT JOIN queue AS entry ON entry.job_id = job.id
LEFT JOIN idempotency_keys ON idempotency_keys.job_id = job.id
LEFT JOIN leftovers ON leftovers.job_id = job.id
"""
# The time of submission says what this event said. Numbers below 1 sort before those of all other events.
FROM_SUBMISSIONS = """
INSERT INTO job_events (id, job_id, at, type, attempt, detail)
SELECT -row_number() OVER (ORDER BY id DESC), id, created_at, 'queued', 0, {empty} FROM jobs
"""


def upgrade() -> None:
    for table in CHILDREN:
        with op.batch_alter_table(table) as batch:
            batch.drop_constraint(f"fk_{table}_job_id", type_="foreignkey")
    _set_aside(
        "ix_jobs_embedding",
        "ix_jobs_expiry",
        "ix_jobs_lease",
        "ix_jobs_owner_id",
        "ix_jobs_owner_status_id",
        "ix_jobs_queue",
        "ix_jobs_stage_queue",
        "ix_jobs_status_id",
    )
    _create_jobs()
    _create_queue()
    _create_idempotency_keys()
    _create_queue_marks()
    _create_leftovers()
    for statement in (TO_QUEUE, TO_KEYS, TO_LEFTOVERS, TO_JOBS, "DELETE FROM job_events WHERE type = 'queued'"):
        op.execute(statement)
    op.drop_table("jobs_before")


def downgrade() -> None:
    _set_aside("ix_jobs_expiry", "ix_jobs_owner_id", "ix_jobs_owner_status_id", "ix_jobs_status_id")
    _create_wide_jobs()
    op.execute(FROM_ALL)
    op.execute(FROM_SUBMISSIONS.format(empty="'{}'" if _is_sqlite() else "'{}'::jsonb"))
    for table in ("jobs_before", "queue", "idempotency_keys", "queue_marks", "leftovers"):
        op.drop_table(table)
    for table in CHILDREN:
        with op.batch_alter_table(table) as batch:
            batch.create_foreign_key(f"fk_{table}_job_id", "jobs", ["job_id"], ["id"], ondelete="CASCADE")


def _is_sqlite() -> bool:
    return op.get_bind().dialect.name == "sqlite"


def _set_aside(*indexes: str) -> None:
    """Rename the table of jobs, and free the names of its indexes."""
    for index in indexes:
        op.drop_index(index, "jobs")
    op.rename_table("jobs", "jobs_before")
    if not _is_sqlite():
        op.execute("ALTER TABLE jobs_before RENAME CONSTRAINT pk_jobs TO pk_jobs_before")


def _index(name: str, table: str, columns: list[str | sa.ColumnElement[object]], where: object = None) -> None:
    op.create_index(name, table, columns, unique=False, postgresql_where=where, sqlite_where=where)


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("owner", sa.String(length=100), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("request", DOCUMENT, nullable=False),
        sa.Column("caller_metadata", DOCUMENT, nullable=False),
        sa.Column("webhook_url", sa.Text(), nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("status", sa.String(length=20), nullable=False),
        sa.Column("completed_at", TIME, nullable=True),
        sa.Column("expires_at", TIME, nullable=True),
        sa.Column("error_code", sa.String(length=50), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("error_retryable", sa.Boolean(), nullable=True),
        sa.Column("metrics", DOCUMENT, nullable=False),
        sa.Column("engine", DOCUMENT, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=True),
        sa.Column("worker", sa.String(length=200), nullable=True),
        sa.Column("started_at", TIME, nullable=True),
        sa.Column("stage", sa.String(length=20), nullable=True),
        sa.Column("embedding_attempt", sa.Integer(), nullable=True),
        sa.Column("cancel_requested_at", TIME, nullable=True),
        sa.CheckConstraint(
            "status IN ('canceled', 'expired', 'failed', 'queued', 'succeeded')", name=op.f("ck_jobs_status_known")
        ),
        sa.CheckConstraint(f"({ENDED}) = (completed_at IS NOT NULL)", name=op.f("ck_jobs_ended_has_time")),
        sa.CheckConstraint(
            "status = 'queued' OR attempt IS NOT NULL AND stage IS NOT NULL", name=op.f("ck_jobs_ended_has_attempt")
        ),
        sa.CheckConstraint("(status = 'failed') = (error_code IS NOT NULL)", name=op.f("ck_jobs_failed_has_error")),
        sa.CheckConstraint(
            "(status IN ('succeeded', 'expired')) = (expires_at IS NOT NULL)", name=op.f("ck_jobs_outputs_expire")
        ),
        sa.CheckConstraint("stage IN ('encode', 'generate')", name=op.f("ck_jobs_stage_known")),
        sa.CheckConstraint("embedding_attempt BETWEEN 1 AND attempt", name=op.f("ck_jobs_embedding_has_attempt")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
    )
    _create_jobs_indexes()


def _create_jobs_indexes() -> None:
    _index("ix_jobs_expiry", "jobs", ["expires_at"], SUCCEEDED)
    _index("ix_jobs_owner_id", "jobs", ["owner", "id"])
    _index("ix_jobs_owner_status_id", "jobs", ["owner", "status", "id"])
    _index("ix_jobs_status_id", "jobs", ["status", "id"])


def _create_queue() -> None:
    op.create_table(
        "queue",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("owner", sa.String(length=100), nullable=False),
        sa.Column("status", sa.String(length=20), nullable=False),
        sa.Column("stage", sa.String(length=20), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("position", sa.Uuid(), nullable=False),
        sa.Column("scheduled", sa.Boolean(), nullable=False),
        sa.Column("available_at", TIME, nullable=False),
        sa.Column("notified_at", TIME, nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("attempts_left", sa.Integer(), nullable=False),
        sa.Column("isolated", sa.Boolean(), nullable=False),
        sa.Column("embedding_attempt", sa.Integer(), nullable=True),
        sa.Column("worker", sa.String(length=200), nullable=True),
        sa.Column("lease_token", sa.Uuid(), nullable=True),
        sa.Column("started_at", TIME, nullable=True),
        sa.Column("cancel_requested_at", TIME, nullable=True),
        sa.Column("lease_until", TIME, nullable=True),
        sa.Column("progress_phase", sa.String(length=20), nullable=True),
        sa.Column("progress_step", sa.Integer(), nullable=False),
        sa.Column("progress_steps", sa.Integer(), nullable=False),
        sa.CheckConstraint("status IN ('queued', 'running')", name=op.f("ck_queue_status_known")),
        sa.CheckConstraint("stage IN ('encode', 'generate')", name=op.f("ck_queue_stage_known")),
        sa.CheckConstraint(LEASE, name=op.f("ck_queue_running_has_lease")),
        sa.CheckConstraint("status = 'queued' OR NOT scheduled", name=op.f("ck_queue_scheduled_is_queued")),
        sa.CheckConstraint(
            "status = 'running' OR cancel_requested_at IS NULL", name=op.f("ck_queue_canceled_is_running")
        ),
        sa.CheckConstraint("attempt >= 0 AND attempts_left >= 0", name=op.f("ck_queue_attempts_counted")),
        sa.CheckConstraint("embedding_attempt BETWEEN 1 AND attempt", name=op.f("ck_queue_embedding_has_attempt")),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_queue")),
        postgresql_with={"fillfactor": 50, "autovacuum_vacuum_scale_factor": 0.01},
    )
    _index("ix_queue_ready", "queue", ["stage", PRIORITY, "position"], READY)
    _index("ix_queue_scheduled", "queue", ["available_at"], SCHEDULED)
    _index("ix_queue_running", "queue", ["job_id"], RUNNING)


def _create_idempotency_keys() -> None:
    op.create_table(
        "idempotency_keys",
        sa.Column("owner", sa.String(length=100), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("owner", "key", name=op.f("pk_idempotency_keys")),
    )
    _index(op.f("ix_idempotency_keys_created_at"), "idempotency_keys", ["created_at"])


def _create_queue_marks() -> None:
    marks = op.create_table(
        "queue_marks",
        sa.Column("stage", sa.String(length=20), nullable=False),
        sa.Column("priority", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("lowest", sa.Uuid(), nullable=False),
        sa.PrimaryKeyConstraint("stage", "priority", name=op.f("pk_queue_marks")),
        postgresql_with={"fillfactor": 50},
    )
    levels = [(stage, priority) for stage in ("encode", "generate") for priority in range(-10, 11)]
    op.bulk_insert(marks, [{"stage": stage, "priority": priority, "lowest": UUID(int=0)} for stage, priority in levels])


def _create_leftovers() -> None:
    op.create_table(
        "leftovers",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("retained_attempt", sa.Integer(), nullable=True),
        sa.Column("images", sa.Integer(), nullable=False),
        sa.Column("format", sa.String(length=10), nullable=False),
        sa.Column("due_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_leftovers")),
    )
    _index(op.f("ix_leftovers_due_at"), "leftovers", ["due_at"])


def _create_wide_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("owner", sa.String(length=100), nullable=False),
        sa.Column("status", sa.String(length=20), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("request", DOCUMENT, nullable=False),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("caller_metadata", DOCUMENT, nullable=False),
        sa.Column("webhook_url", sa.Text(), nullable=True),
        sa.Column("idempotency_key", sa.String(length=255), nullable=True),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("attempts_left", sa.Integer(), nullable=False),
        sa.Column("worker", sa.String(length=200), nullable=True),
        sa.Column("lease_token", sa.Uuid(), nullable=True),
        sa.Column("lease_until", TIME, nullable=True),
        sa.Column("cancel_requested_at", TIME, nullable=True),
        sa.Column("progress_phase", sa.String(length=20), nullable=True),
        sa.Column("progress_step", sa.Integer(), nullable=False),
        sa.Column("progress_steps", sa.Integer(), nullable=False),
        sa.Column("error_code", sa.String(length=50), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("error_retryable", sa.Boolean(), nullable=True),
        sa.Column("metrics", DOCUMENT, nullable=False),
        sa.Column("engine", DOCUMENT, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("available_at", TIME, nullable=False),
        sa.Column("notified_at", TIME, nullable=True),
        sa.Column("started_at", TIME, nullable=True),
        sa.Column("completed_at", TIME, nullable=True),
        sa.Column("expires_at", TIME, nullable=True),
        # With their columns, as revision 0002 has them: SQLite drops a column only if no other CHECK names it.
        sa.Column(
            "stage",
            sa.String(length=20),
            sa.CheckConstraint("stage IN ('encode', 'generate')", name=op.f("ck_jobs_stage_known")),
            server_default="generate",
            nullable=False,
        ),
        sa.Column(
            "embedding_attempt",
            sa.Integer(),
            sa.CheckConstraint("embedding_attempt BETWEEN 1 AND attempt", name=op.f("ck_jobs_embedding_has_attempt")),
            nullable=True,
        ),
        sa.CheckConstraint("(status = 'failed') = (error_code IS NOT NULL)", name=op.f("ck_jobs_failed_has_error")),
        sa.CheckConstraint(LEASE, name=op.f("ck_jobs_running_has_lease")),
        sa.CheckConstraint(f"({ENDED}) = (completed_at IS NOT NULL)", name=op.f("ck_jobs_ended_has_time")),
        sa.CheckConstraint(
            "(status IN ('succeeded', 'expired')) = (expires_at IS NOT NULL)", name=op.f("ck_jobs_outputs_expire")
        ),
        sa.CheckConstraint(
            "status IN ('canceled', 'expired', 'failed', 'queued', 'running', 'succeeded')",
            name=op.f("ck_jobs_status_known"),
        ),
        sa.CheckConstraint("attempt >= 0 AND attempts_left >= 0", name=op.f("ck_jobs_attempts_counted")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
        sa.UniqueConstraint("owner", "idempotency_key", name=op.f("uq_jobs_owner_idempotency_key")),
    )
    _create_jobs_indexes()
    ended = sa.text("completed_at IS NOT NULL AND embedding_attempt IS NOT NULL")
    _index("ix_jobs_embedding", "jobs", ["completed_at"], ended)
    _index("ix_jobs_lease", "jobs", ["lease_until"], RUNNING)
    _index("ix_jobs_queue", "jobs", [PRIORITY, "id"], QUEUED)
    _index("ix_jobs_stage_queue", "jobs", ["stage", PRIORITY, "id"], QUEUED)
