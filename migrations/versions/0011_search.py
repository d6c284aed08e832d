"""An index by which jobs are found by their words, filled for the jobs that there are."""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

# Jobs are found by the terms that this version looks for, whichever they are: so the migration has none of its own.
from zcore.jobs.search_terms import job_terms

revision: str = "0011"
down_revision: str | None = "0009"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

BATCH = 5_000
JOBS = sa.table(
    "jobs",
    sa.column("id", sa.Uuid()),
    sa.column("owner", sa.String()),
    sa.column("request", sa.JSON().with_variant(postgresql.JSONB(), "postgresql")),
    sa.column("caller_metadata", sa.JSON().with_variant(postgresql.JSONB(), "postgresql")),
)
# Blanks end a term, and no other ASCII character does.
SEARCH_INDEX = r"""
CREATE VIRTUAL TABLE search_index USING fts5(
    terms, detail = none, columnsize = 0, prefix = '1 2 3',
    tokenize = "ascii tokenchars '!#$%&''()*+,-./:;<=>?@[\]^_`{|}~'"
)
"""


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        _upgrade_postgresql(op.get_bind())
    else:
        _upgrade_sqlite(op.get_bind())


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.drop_table("search_terms")
    else:
        op.execute("DROP TABLE search_index")
        op.drop_table("search_numbers")


def _upgrade_postgresql(connection: sa.Connection) -> None:
    op.create_table(
        "search_terms",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("terms", postgresql.TSVECTOR(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_search_terms")),
    )
    for rows in _terms_of_jobs(connection):
        with connection.connection.cursor().copy("COPY search_terms FROM STDIN") as copy:
            for job_id, terms in rows:
                copy.write_row((job_id, " ".join(f"'{_escaped(term)}'" for term in terms)))
    # Built after the rows are there: ten times as fast as an index that grows with them.
    op.create_index("ix_search_terms_terms", "search_terms", ["terms"], postgresql_using="gin")


def _upgrade_sqlite(connection: sa.Connection) -> None:
    op.create_table(
        "search_numbers",
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_search_numbers")),
        sa.UniqueConstraint("job_id", name=op.f("uq_search_numbers_job_id")),
    )
    op.execute(SEARCH_INDEX)
    numbers = count(1)
    for rows in _terms_of_jobs(connection):
        numbered = [(next(numbers), job_id.hex, f" {' '.join(terms)} ") for job_id, terms in rows]
        connection.exec_driver_sql(
            "INSERT INTO search_numbers (number, job_id) VALUES (?, ?)", [row[:2] for row in numbered]
        )
        connection.exec_driver_sql(
            "INSERT INTO search_index (rowid, terms) VALUES (?, ?)", [row[::2] for row in numbered]
        )


def _terms_of_jobs(connection: sa.Connection) -> Iterator[list[tuple[Any, list[str]]]]:
    """Yield the ids of all jobs with their terms, oldest first."""
    statement = sa.select(JOBS).order_by(JOBS.c.id).limit(BATCH)
    jobs = connection.execute(statement).all()
    while jobs:
        yield [(job.id, job_terms(job.request["prompt"], job.caller_metadata, job.owner)) for job in jobs]
        jobs = connection.execute(statement.where(JOBS.c.id > jobs[-1].id)).all()


def _escaped(term: str) -> str:
    return term.replace("\\", "\\\\").replace("'", "''")
