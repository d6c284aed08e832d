"""Rename columns, a constraint and event types to the terms that the code and its documentation use."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0005"
down_revision: str | None = "0004"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

# Each is (table, old name, new name).
COLUMNS = (
    ("jobs", "announced_at", "notified_at"),
    ("webhook_attempts", "answer", "response_body"),
)
CONSTRAINTS = (("jobs", "ck_jobs_pictures_expire", "ck_jobs_outputs_expire"),)
# Each is (old type, new type).
EVENTS = (
    ("memory_relieved", "oom_fallback"),
    ("postponed", "retry_scheduled"),
    ("handed_back", "released"),
    ("sent_to_encode", "returned_to_encode"),
)


def upgrade() -> None:
    for table, old, new in COLUMNS:
        _rename_column(table, old, new)
    for table, old, new in CONSTRAINTS:
        _rename_constraint(table, old, new)
    for old, new in EVENTS:
        _rename_event(old, new)


def downgrade() -> None:
    for table, old, new in COLUMNS:
        _rename_column(table, new, old)
    for table, old, new in CONSTRAINTS:
        _rename_constraint(table, new, old)
    for old, new in EVENTS:
        _rename_event(new, old)


def _rename_column(table: str, old: str, new: str) -> None:
    # SQLite renames columns in place too; a rebuilt table would lose the rows that its foreign keys cascade to.
    op.execute(f"ALTER TABLE {table} RENAME COLUMN {old} TO {new}")


def _rename_constraint(table: str, old: str, new: str) -> None:
    if op.get_bind().dialect.name != "sqlite":
        op.execute(f"ALTER TABLE {table} RENAME CONSTRAINT {old} TO {new}")
        return
    # SQLite cannot rename a constraint. Its documentation (https://www.sqlite.org/lang_altertable.html, section 7)
    # gives this procedure for changes that do not affect the stored rows; the new schema version makes every
    # connection read the schema again.
    connection = op.get_bind()
    version = connection.exec_driver_sql("PRAGMA schema_version").scalar_one()
    connection.exec_driver_sql("PRAGMA writable_schema = ON")
    connection.execute(
        sa.text("UPDATE sqlite_master SET sql = replace(sql, :old, :new) WHERE type = 'table' AND name = :table"),
        {"old": old, "new": new, "table": table},
    )
    connection.exec_driver_sql(f"PRAGMA schema_version = {version + 1}")
    connection.exec_driver_sql("PRAGMA writable_schema = OFF")


def _rename_event(old: str, new: str) -> None:
    op.execute(sa.text("UPDATE job_events SET type = :new WHERE type = :old").bindparams(new=new, old=old))
