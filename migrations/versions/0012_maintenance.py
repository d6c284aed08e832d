"""The leader of maintenance, the progress of its sweep, and under which key, and whether, an upload is stored."""

import hashlib
from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0012"
down_revision: str | None = "0011"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

EARLIER_UPLOADS = "inputs_of_0012"
"""The uploads that a downgrade took out of `inputs`, because the version before would look under other keys."""
COLUMNS = "owner, sha256, format, width, height, bytes, expires_at, storage_key, stored_at"
IS_NEWER = "storage_key LIKE 'inputs/%/%-%'"
INPUTS = sa.table("inputs", sa.column("owner"), sa.column("sha256"), sa.column("storage_key"), sa.column("stored_at"))


def upgrade() -> None:
    op.add_column("inputs", sa.Column("storage_key", sa.String(length=200), nullable=True))
    op.add_column("inputs", sa.Column("stored_at", sa.DateTime(timezone=True), nullable=True))
    connection = op.get_bind()
    for owner, sha256 in connection.execute(sa.select(INPUTS.c.owner, INPUTS.c.sha256)).all():
        connection.execute(
            sa.update(INPUTS)
            .where(INPUTS.c.owner == owner, INPUTS.c.sha256 == sha256)
            .values(storage_key=_earlier_key(owner, sha256), stored_at=sa.func.current_timestamp())
        )
    with op.batch_alter_table("inputs") as batch:
        batch.alter_column("storage_key", existing_type=sa.String(length=200), nullable=False)
    op.create_index(op.f("ix_inputs_storage_key"), "inputs", ["storage_key"], unique=True)
    if sa.inspect(connection).has_table(EARLIER_UPLOADS):
        _restore_uploads()
    op.add_column("leftovers", sa.Column("tries", sa.Integer(), server_default="0", nullable=False))
    op.create_table(
        "leaders",
        sa.Column("work", sa.String(length=50), nullable=False),
        sa.Column("holder", sa.String(length=300), nullable=False),
        sa.Column("until", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("work", name=op.f("pk_leaders")),
    )
    op.create_table(
        "sweeps",
        sa.Column("prefix", sa.String(length=50), nullable=False),
        sa.Column("after", sa.Text(), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("prefix", name=op.f("pk_sweeps")),
    )
    for prefix in ("inputs/", "jobs/", "loras/"):
        op.execute(
            sa.text("INSERT INTO sweeps (prefix, after, due_at) VALUES (:prefix, '', CURRENT_TIMESTAMP)").bindparams(
                prefix=prefix
            )
        )


def downgrade() -> None:
    op.drop_table("sweeps")
    op.drop_table("leaders")
    op.drop_column("leftovers", "tries")
    op.drop_index(op.f("ix_inputs_storage_key"), "inputs")
    _set_newer_uploads_aside()
    with op.batch_alter_table("inputs") as batch:
        batch.drop_column("stored_at")
        batch.drop_column("storage_key")


def _set_newer_uploads_aside() -> None:
    if not op.get_bind().scalar(sa.text(f"SELECT count(*) FROM inputs WHERE {IS_NEWER}")):
        return
    op.execute(f"CREATE TABLE {EARLIER_UPLOADS} AS SELECT {COLUMNS} FROM inputs WHERE {IS_NEWER}")
    op.execute(f"DELETE FROM inputs WHERE {IS_NEWER}")


def _restore_uploads() -> None:
    """Restore what a downgrade has set aside, except what was uploaded again in the meantime."""
    op.execute(
        f"INSERT INTO inputs ({COLUMNS}) SELECT {COLUMNS} FROM {EARLIER_UPLOADS} AS earlier WHERE NOT EXISTS"
        " (SELECT 1 FROM inputs WHERE inputs.owner = earlier.owner AND inputs.sha256 = earlier.sha256)"
    )
    op.drop_table(EARLIER_UPLOADS)


def _earlier_key(owner: str, sha256: str) -> str:
    """Return the key under which every upload was stored before its row contained the key."""
    return f"inputs/{hashlib.sha256(owner.encode()).hexdigest()}/{sha256}"
