"""Jobs may be encoded on one machine and painted on another: their stage, and who encoded them."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


DOCUMENT = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
QUEUED = sa.text("status = 'queued'")
ENDED_WITH_EMBEDDING = sa.text("completed_at IS NOT NULL AND embedding_attempt IS NOT NULL")
# Written out, because SQLite adds a CHECK only together with its column: rebuilding the table instead would drop the
# old one, and with it, by their foreign keys, everything that is recorded of its jobs.
STAGE = """ALTER TABLE jobs ADD COLUMN stage VARCHAR(20) DEFAULT 'generate' NOT NULL
    CONSTRAINT ck_jobs_stage_known CHECK (stage IN ('encode', 'generate'))"""
EMBEDDING_ATTEMPT = """ALTER TABLE jobs ADD COLUMN embedding_attempt INTEGER
    CONSTRAINT ck_jobs_embedding_has_attempt CHECK (embedding_attempt BETWEEN 1 AND attempt)"""


def upgrade() -> None:
    op.execute(STAGE)
    op.execute(EMBEDDING_ATTEMPT)
    op.create_index(
        "ix_jobs_stage_queue",
        "jobs",
        ["stage", sa.literal_column("priority DESC"), "id"],
        unique=False,
        postgresql_where=QUEUED,
        sqlite_where=QUEUED,
    )
    op.create_index(
        "ix_jobs_embedding",
        "jobs",
        ["completed_at"],
        unique=False,
        postgresql_where=ENDED_WITH_EMBEDDING,
        sqlite_where=ENDED_WITH_EMBEDDING,
    )
    # Those that are there show themselves again within seconds.
    op.drop_table("workers")
    _create_workers(sa.Column("stages", DOCUMENT, nullable=False))


def downgrade() -> None:
    op.drop_table("workers")
    _create_workers()
    op.drop_index("ix_jobs_embedding", "jobs")
    op.drop_index("ix_jobs_stage_queue", "jobs")
    op.drop_column("jobs", "embedding_attempt")
    op.drop_column("jobs", "stage")


def _create_workers(*more: sa.Column[object]) -> None:
    op.create_table(
        "workers",
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("device", sa.String(length=100), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        *more,
        sa.PrimaryKeyConstraint("name", name=op.f("pk_workers")),
    )
