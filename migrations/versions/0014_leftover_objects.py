"""The objects that are to be deleted although no row of a job names them, such as expired uploads."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0014"
down_revision: str | None = "0012"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "leftover_objects",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("tries", sa.Integer(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_leftover_objects")),
    )
    op.create_index(op.f("ix_leftover_objects_due_at"), "leftover_objects", ["due_at"])


def downgrade() -> None:
    op.drop_table("leftover_objects")
