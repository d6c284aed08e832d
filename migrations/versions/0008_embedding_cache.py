"""How often a worker found a prompt's embedding in its cache."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0008"
down_revision: str | None = "0007"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

COLUMNS = ("embedding_cache_hits", "embedding_cache_misses")


def upgrade() -> None:
    for name in COLUMNS:
        op.add_column("workers", sa.Column(name, sa.Integer(), server_default="0", nullable=False))


def downgrade() -> None:
    for name in reversed(COLUMNS):
        op.drop_column("workers", name)
