"""A page of the job list costs the same at any depth, measured by the rows that PostgreSQL reads."""

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from sqlalchemy import event, text

from zcore.jobs import queries
from zcore.jobs.database import Database
from zcore.jobs.queries import JobFilter, Page
from zcore.jobs.states import State

JOBS = 20_000
LIMIT = 30
# The oldest 400 failed, all later ones were canceled; ids as version 7 makes them, one a second.
FILL = """
INSERT INTO jobs (id, owner, status, priority, request, caller_metadata, attempt, stage, metrics, engine, created_at,
                  completed_at, error_code)
SELECT (lpad(to_hex((1700000000 + n)::bigint * 1000), 12, '0') || '70008000' || lpad(to_hex(n), 12, '0'))::uuid,
       'owner ' || n % 200, CASE WHEN n <= 400 THEN 'failed' ELSE 'canceled' END, 0, '{}', '{}', 1,
       'generate', '{}', '{}', to_timestamp(1700000000 + n), to_timestamp(1700000000 + n),
       CASE WHEN n <= 400 THEN 'model_unavailable' END
FROM generate_series(1, :jobs) AS n
"""


@pytest.fixture
def long_history(database_url: str) -> Iterator[Database]:
    """A database with many jobs and current planner statistics."""
    with closing(Database(database_url)) as database:
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text(FILL), {"jobs": JOBS})
            connection.exec_driver_sql("VACUUM ANALYZE jobs, queue")
        yield database


@pytest.mark.parametrize(
    ("job_filter", "depth"),
    [
        (JobFilter(), 60),
        (JobFilter(status=State.FAILED), 11),
        (JobFilter(owner="owner 3"), 2),
        (JobFilter("owner 3", State.CANCELED), 2),
    ],
    ids=["all jobs", "old status", "owner", "owner and status"],
)
def test_a_deep_page_reads_no_more_than_the_first(long_history: Database, job_filter: JobFilter, depth: int) -> None:
    *_, deep = pages(long_history, job_filter, depth)
    assert deep.next_cursor is not None
    assert rows_read(long_history, job_filter, None) == LIMIT + 1
    assert rows_read(long_history, job_filter, deep.next_cursor) == LIMIT + 1
    assert rows_read(long_history, job_filter, deep.next_cursor, newer=True) == LIMIT + 1


def pages(database: Database, job_filter: JobFilter, count: int) -> Iterator[Page]:
    """Yield the first `count` pages by following the cursors."""
    cursor = None
    for _ in range(count):
        with database.read() as transaction:
            page = queries.page(transaction, job_filter, cursor, LIMIT)
        yield page
        cursor = page.next_cursor


def rows_read(database: Database, job_filter: JobFilter, cursor: str | None, *, newer: bool = False) -> int:
    """Return how many rows PostgreSQL reads for this page, including discarded ones. Sorting jobs is an error."""
    executed: list[tuple[str, Any]] = []

    def listen(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        executed.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", listen)
    with database.read() as transaction:
        queries.page(transaction, job_filter, cursor, LIMIT, newer=newer)
    event.remove(database.engine, "before_cursor_execute", listen)
    [(statement, parameters)] = [entry for entry in executed if "FROM jobs" in entry[0]]
    with database.engine.connect() as connection:
        plan = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters).scalar_one()
    nodes = list(_nodes((plan if isinstance(plan, list) else json.loads(plan))[0]["Plan"]))
    sorts = [node for node in nodes if "Sort" in node["Node Type"]]
    assert not [node for sort in sorts for node in _nodes(sort) if node.get("Relation Name") == "jobs"]
    scans = [node for node in nodes if "Scan" in node["Node Type"]]
    return sum(int(node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) for node in scans)


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", []):
        yield from _nodes(inner)
