"""On PostgreSQL, what belongs to jobs is partitioned by the week of submission; keys begin with the job's id.

The tables that there are become the first partition as they are; only the few webhook attempts are copied.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from uuid import UUID

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0015"
down_revision: str | None = "0014"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

DOCUMENT = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
TIME = sa.DateTime(timezone=True)
ROW_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
SUCCEEDED, DUE = sa.text("status = 'succeeded'"), sa.text("next_attempt_at IS NOT NULL")
KEYS = {
    "jobs": ("id",),
    "job_outputs": ("job_id", "position"),
    "job_events": ("job_id", "id"),
    "webhook_events": ("job_id", "id"),
    "webhook_attempts": ("job_id", "id"),
}
"""The tables that are partitioned by the first column of these keys."""
REBUILT = ("job_events", "webhook_events", "webhook_attempts")
"""Those whose key changes."""
WEEKS_AHEAD = 2

ATTEMPTS = "id, job_id, event_id, number, at, duration_ms, status_code, response_body"
TO_ATTEMPTS = f"""
INSERT INTO {{table}} ({ATTEMPTS})
SELECT attempt.id, event.job_id, event_id, number, at, duration_ms, status_code, response_body
FROM webhook_attempts_before AS attempt JOIN webhook_events AS event ON event.id = attempt.event_id
"""
FROM_ATTEMPTS = """
INSERT INTO webhook_attempts (id, event_id, number, at, duration_ms, status_code, response_body)
SELECT row_number() OVER (ORDER BY job_id, id), event_id, number, at, duration_ms, status_code, response_body
FROM webhook_attempts_before
"""
FROM_EVENTS = """
INSERT INTO job_events (id, job_id, at, type, attempt, detail)
SELECT row_number() OVER (ORDER BY job_id, id), job_id, at, type, attempt, detail FROM job_events_before
"""
COPY_EVENTS = "INSERT INTO job_events SELECT id, job_id, at, type, attempt, detail FROM job_events_before"
COPY_WEBHOOKS = """
INSERT INTO webhook_events (id, job_id, type, url, snapshot, created_at, attempt, next_attempt_at, delivered_at)
SELECT id, job_id, type, url, snapshot, created_at, attempt, next_attempt_at, delivered_at FROM webhook_events_before
"""


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        _rename("webhook_attempts", "ix_webhook_attempts_event_id")
        _create_attempts()
        op.execute(TO_ATTEMPTS.format(table="webhook_attempts"))
        op.drop_table("webhook_attempts_before")
        _rename("job_events", "ix_job_events_job_id")
        _create_events()
        op.execute(COPY_EVENTS)
        op.drop_table("job_events_before")
        _rename("webhook_events", "ix_webhook_events_due", "ix_webhook_events_job_id")
        _create_webhooks()
        op.execute(COPY_WEBHOOKS)
        op.drop_table("webhook_events_before")
    else:
        _partition()
        # Workers report every few seconds; their new versions then stay within the page.
        op.execute("ALTER TABLE workers SET (fillfactor = 50)")


def downgrade() -> None:
    on_sqlite = op.get_bind().dialect.name == "sqlite"
    if not on_sqlite:
        op.execute("ALTER TABLE workers RESET (fillfactor)")
        for table, indexes in (
            ("jobs", ("ix_jobs_expiry", "ix_jobs_owner_id", "ix_jobs_owner_status_id", "ix_jobs_status_id")),
            ("job_outputs", ()),
        ):
            _rename(table, *indexes)
            op.execute(f"CREATE TABLE {table} (LIKE {table}_before INCLUDING CONSTRAINTS)")
            op.execute(f"INSERT INTO {table} SELECT * FROM {table}_before")
            op.drop_table(f"{table}_before")
            op.create_primary_key(f"pk_{table}", table, list(KEYS[table]))
        _create_jobs_indexes()
    _rename("webhook_events", "ix_webhook_events_due")
    _create_earlier_webhooks()
    op.execute(COPY_WEBHOOKS)
    op.drop_table("webhook_events_before")
    for table, create, copy in (
        ("job_events", _create_earlier_events, FROM_EVENTS),
        ("webhook_attempts", _create_earlier_attempts, FROM_ATTEMPTS),
    ):
        _rename(table)
        create()
        op.execute(copy)
        op.drop_table(f"{table}_before")
        if not on_sqlite:
            op.execute(
                f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), coalesce(max(id), 0) + 1, false) FROM {table}"
            )


def _partition() -> None:
    """Make each table the first partition of a new one that has its name."""
    _rename("webhook_attempts", "ix_webhook_attempts_event_id")
    op.execute("ALTER TABLE webhook_attempts_before DROP CONSTRAINT fk_webhook_attempts_event_id")
    _create_attempts("webhook_attempts_first")
    op.execute(TO_ATTEMPTS.format(table="webhook_attempts_first"))
    op.drop_table("webhook_attempts_before")
    op.execute("ALTER TABLE job_events ALTER COLUMN id DROP DEFAULT")
    op.execute("DROP SEQUENCE job_events_id_seq")
    for table in ("job_events", "webhook_events"):
        op.drop_constraint(f"pk_{table}", table)
        op.drop_index(f"ix_{table}_job_id", table)
        op.create_primary_key(f"{table}_first_pkey", table, list(KEYS[table]))
    for table in ("jobs", "job_outputs"):
        op.execute(f"ALTER INDEX pk_{table} RENAME TO {table}_first_pkey")
    for index in ("expiry", "owner_id", "owner_status_id", "status_id"):
        op.execute(f"ALTER INDEX ix_jobs_{index} RENAME TO jobs_first_{index}")
    op.execute("ALTER INDEX ix_webhook_events_due RENAME TO webhook_events_first_due")
    weeks = _weeks()
    for table, key in KEYS.items():
        if table != "webhook_attempts":
            op.rename_table(table, f"{table}_first")
        op.execute(f"CREATE TABLE {table} (LIKE {table}_first INCLUDING CONSTRAINTS) PARTITION BY RANGE ({key[0]})")
        op.create_primary_key(f"pk_{table}", table, list(key))
        if table == "jobs":
            _create_jobs_indexes()
        if table == "webhook_events":
            _create_due_index()
        op.execute(
            f"ALTER TABLE {table} ATTACH PARTITION {table}_first FOR VALUES FROM (MINVALUE) TO ({_id(weeks[0])})"
        )
        for week, next_week in pairwise(weeks):
            op.execute(
                f"CREATE TABLE {table}_{week:%Y%m%d} PARTITION OF {table}"
                f" FOR VALUES FROM ({_id(week)}) TO ({_id(next_week)})"
            )
        op.execute(f"CREATE TABLE {table}_last PARTITION OF {table} FOR VALUES FROM ({_id(weeks[-1])}) TO (MAXVALUE)")


def _weeks() -> list[datetime]:
    """Return the beginnings of the weeks that follow the first partition: of the next ones, or after the newest job."""
    connection = op.get_bind()
    newest = connection.execute(sa.text("SELECT id FROM jobs ORDER BY id DESC LIMIT 1")).scalar()
    now: datetime = connection.execute(sa.text("SELECT now()")).scalar_one()
    ms = max(now.timestamp() * 1000, 0 if newest is None else newest.int >> 80)
    today = datetime.fromtimestamp(ms / 1000, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    monday = today - timedelta(days=today.weekday())
    return [monday + timedelta(weeks=1 + ahead) for ahead in range(WEEKS_AHEAD + 1)]


def _id(week: datetime) -> str:
    """Return the lowest id of jobs that are submitted in that week, as a literal."""
    return f"'{UUID(int=int(week.timestamp() * 1000) << 80)}'"


def _rename(table: str, *indexes: str) -> None:
    """Rename a table, and free the names of its indexes."""
    for index in indexes:
        op.drop_index(index, table)
    op.rename_table(table, f"{table}_before")
    if op.get_bind().dialect.name != "sqlite":
        op.execute(f"ALTER TABLE {table}_before RENAME CONSTRAINT pk_{table} TO pk_{table}_before")
        if table in ("job_events", "webhook_attempts"):
            op.execute(f"ALTER SEQUENCE IF EXISTS {table}_id_seq RENAME TO {table}_before_id_seq")


def _create_jobs_indexes() -> None:
    op.create_index("ix_jobs_expiry", "jobs", ["expires_at"], postgresql_where=SUCCEEDED)
    op.create_index("ix_jobs_owner_id", "jobs", ["owner", "id"])
    op.create_index("ix_jobs_owner_status_id", "jobs", ["owner", "status", "id"])
    op.create_index("ix_jobs_status_id", "jobs", ["status", "id"])


def _create_due_index() -> None:
    op.create_index(
        "ix_webhook_events_due", "webhook_events", ["next_attempt_at"], postgresql_where=DUE, sqlite_where=DUE
    )


def _create_events() -> None:
    op.create_table(
        "job_events",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        *_event_columns(),
        sa.PrimaryKeyConstraint("job_id", "id", name=op.f("pk_job_events")),
    )


def _create_earlier_events() -> None:
    op.create_table(
        "job_events",
        sa.Column("id", ROW_NUMBER, autoincrement=True, nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        *_event_columns(),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job_events")),
    )
    op.create_index(op.f("ix_job_events_job_id"), "job_events", ["job_id"])


def _create_webhooks() -> None:
    op.create_table(
        "webhook_events",
        *_webhook_columns(),
        sa.PrimaryKeyConstraint("job_id", "id", name=op.f("pk_webhook_events")),
    )
    _create_due_index()


def _create_earlier_webhooks() -> None:
    op.create_table(
        "webhook_events", *_webhook_columns(), sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_events"))
    )
    _create_due_index()
    op.create_index(op.f("ix_webhook_events_job_id"), "webhook_events", ["job_id"])


def _create_attempts(name: str = "webhook_attempts") -> None:
    key = "pk_webhook_attempts" if name == "webhook_attempts" else f"{name}_pkey"
    op.create_table(
        name,
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        *_attempt_columns(),
        sa.PrimaryKeyConstraint("job_id", "id", name=op.f(key)),
    )


def _create_earlier_attempts() -> None:
    op.create_table(
        "webhook_attempts",
        sa.Column("id", ROW_NUMBER, autoincrement=True, nullable=False),
        *_attempt_columns(),
        sa.ForeignKeyConstraint(
            ["event_id"], ["webhook_events.id"], name=op.f("fk_webhook_attempts_event_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_attempts")),
    )
    op.create_index(op.f("ix_webhook_attempts_event_id"), "webhook_attempts", ["event_id"])


def _event_columns() -> list[sa.Column[object]]:
    return [
        sa.Column("at", TIME, nullable=False),
        sa.Column("type", sa.String(length=30), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("detail", DOCUMENT, nullable=False),
    ]


def _webhook_columns() -> list[sa.schema.SchemaItem]:
    return [
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("type", sa.String(length=30), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("snapshot", DOCUMENT, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("next_attempt_at", TIME, nullable=True),
        sa.Column("delivered_at", TIME, nullable=True),
        sa.CheckConstraint(
            "delivered_at IS NULL OR next_attempt_at IS NULL", name=op.f("ck_webhook_events_delivered_is_done")
        ),
    ]


def _attempt_columns() -> list[sa.Column[object]]:
    return [
        sa.Column("event_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("duration_ms", sa.Integer(), nullable=False),
        sa.Column("status_code", sa.Integer(), nullable=True),
        sa.Column("response_body", sa.Text(), nullable=False),
    ]
