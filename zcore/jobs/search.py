"""The index by which jobs are found by their words: tsvector and GIN on PostgreSQL, FTS5 on SQLite.

Takes a `Transaction`. An entry of the index is added with its job and never changes, so what changes, such as the
status, is not in it. Both databases find the same jobs, because both have the terms of `search_terms`.
"""

import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import ARRAY, ColumnElement, Select, Text, cast, delete, func, insert, literal_column, select
from sqlalchemy.dialects.postgresql import TSQUERY, TSVECTOR

from zcore.jobs.database import Transaction
from zcore.jobs.ids import nearest_id
from zcore.jobs.models import SEARCH_INDEX, Job, SearchNumber, SearchTerms
from zcore.jobs.search_terms import Word, job_terms

# The indexes know no order, so that of a million hits they would return the newest last. What is common is therefore
# looked for among this many of the newest jobs first, one by one; of what is not found there, the index has few.
PROBED = 2_000
# A word that this many of them have is not looked up in the index even if others are.
COMMON = PROBED // 10


@dataclass(frozen=True, slots=True)
class IdRange:
    """The ids between two, inclusive, in one of the two orders. Ids sort by time of submission."""

    lowest: uuid.UUID
    highest: uuid.UUID
    newest_first: bool = True

    def after(self, last: uuid.UUID) -> "IdRange":
        """Return the part that follows `last`, which lies in this one."""
        if self.newest_first:
            return replace(self, highest=nearest_id(last.int - 1))
        return replace(self, lowest=nearest_id(last.int + 1))

    def contains(self, job_id: Any) -> ColumnElement[bool]:
        """Return the condition that the column is in the range."""
        return job_id.between(self.lowest, self.highest)

    def order(self, column: Any) -> ColumnElement[Any]:
        """Return the column in this order, to sort by."""
        return column.desc() if self.newest_first else column.asc()


def add(transaction: Transaction, job: Job) -> None:
    """Add a new job to the index."""
    session = transaction.session
    terms = job_terms(job.request["prompt"], job.caller_metadata, job.owner)
    if _is_postgresql(transaction):
        vector = func.array_to_tsvector(cast(terms, ARRAY(Text)))
        session.execute(insert(SearchTerms).values(job_id=job.id, terms=vector))
    else:
        number = session.scalars(insert(SearchNumber).values(job_id=job.id).returning(SearchNumber.number)).one()
        session.execute(insert(SEARCH_INDEX).values(rowid=number, terms=f" {' '.join(terms)} "))


def remove(transaction: Transaction, job_ids: Collection[uuid.UUID]) -> None:
    """Remove jobs from the index."""
    session = transaction.session
    if _is_postgresql(transaction):
        session.execute(delete(SearchTerms).where(SearchTerms.job_id.in_(job_ids)))
    else:
        numbers = session.scalars(
            delete(SearchNumber).where(SearchNumber.job_id.in_(job_ids)).returning(SearchNumber.number)
        ).all()
        session.execute(delete(SEARCH_INDEX).where(SEARCH_INDEX.c.rowid.in_(numbers)))


def remove_range(transaction: Transaction, range_of_ids: ColumnElement[bool], limit: int) -> int:
    """Remove up to `limit` jobs in a range of `SearchTerms.job_id` (PostgreSQL only). Return how many were removed."""
    some = select(SearchTerms.job_id).where(range_of_ids).limit(limit)
    removed = delete(SearchTerms).where(SearchTerms.job_id.in_(some)).returning(SearchTerms.job_id)
    return len(transaction.session.scalars(removed).all())


def find(
    transaction: Transaction, words: Sequence[Word], candidates: Select[uuid.UUID], ids: IdRange, limit: int
) -> list[uuid.UUID]:
    """Return the ids of the first `limit` candidates that have all the words; none if there are no words.

    `candidates` selects the ids of the jobs in the range that may be returned, in its order.
    """
    if not words:
        return []
    session = transaction.session
    if _is_postgresql(transaction):
        terms, has, looked_up = SearchTerms.terms, _has_on_postgresql, _looked_up_on_postgresql
        entries = select(SearchTerms.job_id, terms)
    else:
        terms, has, looked_up = SEARCH_INDEX.c.terms, _has_on_sqlite, _looked_up_on_sqlite
        entries = select(SearchNumber.job_id, terms).join(SEARCH_INDEX, SEARCH_INDEX.c.rowid == SearchNumber.number)
    job_id = entries.selected_columns.job_id
    near = entries.where(ids.contains(job_id)).subquery()
    probed = candidates.join(near, near.c.job_id == Job.id).add_columns(near.c.terms).limit(PROBED).subquery()
    conditions = [has(probed.c.terms, word) for word in words]
    found = list(session.scalars(select(probed.c.id).where(*conditions).limit(limit)))
    last = session.scalar(candidates.offset(PROBED - 1).limit(1)) if len(found) < limit else None
    if last is None:
        return found
    counts = session.execute(select(*(func.count().filter(condition) for condition in conditions))).one()
    rare = [word for word, count in zip(words, counts, strict=True) if count < max(COMMON, min(counts) + 1)]
    others = [has(terms, word) for word in words if word not in rare]
    matching = entries.where(ids.after(last).contains(job_id), looked_up(rare), *others)
    # Materialized, or PostgreSQL might read jobs until it has enough hits, and there may be none. It looks the jobs of
    # the hits up, one by one.
    hits = matching.order_by(ids.order(job_id)).cte("hits").prefix_with("MATERIALIZED")
    candidate = candidates.where(Job.id == hits.c.job_id).order_by(None).limit(1).scalar_subquery()
    rest = select(hits.c.job_id).where(candidate.is_not(None)).order_by(ids.order(hits.c.job_id))
    return [*found, *session.scalars(rest.limit(limit - len(found)))]


def _has_on_postgresql(terms: Any, word: Word) -> ColumnElement[bool]:
    """Compare the terms of each entry: an expression instead of the column keeps PostgreSQL from using the index."""
    return func.coalesce(terms, cast("", TSVECTOR)).op("@@")(cast(_tsquery([word]), TSQUERY))


def _looked_up_on_postgresql(words: Sequence[Word]) -> ColumnElement[bool]:
    return SearchTerms.terms.op("@@")(cast(_tsquery(words), TSQUERY))


def _tsquery(words: Sequence[Word]) -> str:
    escaped = ((word.text.replace("\\", "\\\\").replace("'", "''"), ":*" * word.is_beginning) for word in words)
    return " & ".join(f"'{text}'{suffix}" for text, suffix in escaped)


def _has_on_sqlite(terms: Any, word: Word) -> ColumnElement[bool]:
    return func.instr(terms, f" {word.text}" if word.is_beginning else f" {word.text} ") > 0


def _looked_up_on_sqlite(words: Sequence[Word]) -> ColumnElement[bool]:
    expression = " ".join(f'"{word.text}"{" *" * word.is_beginning}' for word in words)
    matching = select(SEARCH_INDEX.c.rowid).where(literal_column("search_index").op("MATCH")(expression))
    return SearchNumber.number.in_(matching)


def _is_postgresql(transaction: Transaction) -> bool:
    return transaction.session.get_bind().dialect.name == "postgresql"
