"""How long does a claim take when the queue is in a state that claims find hard?

Method: one database of PostgreSQL each, filled by one statement; then 300 claims one after another, each its own
transaction over the same connection, after 20 to warm up. Maintenance has moved the marks before, as it does every
15 s. Reported by the same claims on a queue of just these jobs, measured in the same run: elapsed time; CPU time
of the client and of the server's process together, which an idle machine would come near to; and the pages that the
server's process reads, which are an exact counter. Goal: p99 below 20 ms.

Dead entries are of jobs that were submitted in the ten minutes before and have left the queue, under a snapshot that
was taken before they left, as by a backup that runs for ten minutes; the snapshot is held, but not for that long. A
tenth of them is younger than a minute, and so behind no mark. While the oldest job is still running, all of them are.
"""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy import text

from tests.benchmarks import cpu
from tests.benchmarks.report import report, spread
from tests.services.postgres import Postgres
from zcore.jobs import claims
from zcore.jobs.database import Database

pytestmark = pytest.mark.benchmarks

CLAIMS = 300
WARM_UP = 20
JOBS = """
WITH ids AS (
    SELECT (
        lpad(to_hex(CAST(:first + n * :step AS bigint)), 12, '0') || '70008000' || lpad(to_hex(n), 12, '0')
    )::uuid AS id
    FROM generate_series(1, :count) AS n
), rows AS (
    INSERT INTO jobs (id, owner, priority, request, caller_metadata, created_at, status, metrics, engine)
    SELECT id, 'anna', 0, '{"prompt": "a fox", "seed": 1, "n": 1}', '{}', now(), 'queued', '{}', '{}' FROM ids
)
INSERT INTO queue (job_id, owner, status, stage, priority, position, scheduled, available_at, attempt, attempts_left,
                   isolated, progress_step, progress_steps)
SELECT id, 'anna', 'queued', 'generate', 0, id, :scheduled, now() + :wait * interval '1 s', 0, 3, false, 0, 0 FROM ids
"""
TEN_MINUTES_MS = 600_000
PAGES = "SELECT sum(hits + reads) FROM pg_stat_get_backend_io(pg_backend_pid()) WHERE object = 'relation'"


@dataclass
class Samples:
    """What each claim took, in milliseconds, and the pages that the server read for all of them."""

    clock: list[float] = field(default_factory=list[float])
    cpu: list[float] = field(default_factory=list[float])
    pages: int = 0

    def report(self) -> dict[str, Any]:
        """Return the spreads of the times, and the pages per claim."""
        return {"ms": spread(self.clock), "cpu_ms": spread(self.cpu), "pages": round(self.pages / CLAIMS)}


@pytest.fixture
def database(postgres: Postgres, migrated_template: str) -> Iterator[Database]:
    with postgres.database(migrated_template) as url, closing(Database(url, pool_size=2, limits=None)) as opened:
        yield opened


def fill(database: Database, count: int, first_ms: int | None = None, step_ms: float = 0, wait_s: int = -1) -> None:
    """Add this many queued jobs, submitted `step_ms` after each other from `first_ms` on, by default now.

    They become due in `wait_s` seconds.
    """
    with database.write() as transaction:
        first = round(1000 * transaction.now.timestamp()) if first_ms is None else first_ms
        values = {"first": first, "step": step_ms, "count": count, "scheduled": wait_s > 0, "wait": wait_s}
        transaction.session.execute(text(JOBS), values)
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE queue")


def measured(database: Database) -> Samples:
    """Claim jobs one after another, and return what each claim took."""
    with database.write() as transaction:
        claims.advance_marks(transaction)
    for _ in range(WARM_UP):
        claim(database)
    samples, server = Samples(), server_process(database)
    pages = pages_read(database)
    for _ in range(CLAIMS):
        began, client, served = time.perf_counter(), cpu.client_ms(), cpu.server_ms(server)
        claim(database)
        samples.clock.append(1000 * (time.perf_counter() - began))
        samples.cpu.append(cpu.client_ms() - client + cpu.server_ms(server) - served)
    samples.pages = pages_read(database) - pages
    assert server_process(database) == server
    return samples


def claim(database: Database) -> None:
    with database.write() as transaction:
        assert claims.claim(transaction, "worker-1", 600) is not None


def server_process(database: Database) -> int:
    """Return the server's process behind the connection that the next transaction takes."""
    with database.engine.connect() as connection:
        return int(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())


def pages_read(database: Database) -> int:
    """Return how many pages of tables and indexes that process has read so far, from memory or from a file."""
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("SELECT pg_stat_force_next_flush()")
        return int(connection.exec_driver_sql(PAGES).scalar_one())


@pytest.mark.parametrize(
    "hindrance",
    [
        "100,000 dead entries and a snapshot",
        "100,000 dead entries and a snapshot, the oldest job running",
        "10^6 queued",
        "100,000 postponed",
    ],
)
def test_claims(postgres: Postgres, migrated_template: str, database: Database, hindrance: str) -> None:
    fill(database, WARM_UP + CLAIMS)
    alone = measured(database)
    with (
        postgres.database(migrated_template) as url,
        closing(Database(url, pool_size=2, limits=None)) as hard,
        hard.engine.connect() as backup,
    ):
        ten_minutes_ago = round(1000 * time.time()) - TEN_MINUTES_MS
        if "running" in hindrance:
            fill(hard, 1, ten_minutes_ago)
            claim(hard)
        if "dead" in hindrance:
            fill(hard, 100_000, ten_minutes_ago, TEN_MINUTES_MS / 100_000)
            backup.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            backup.exec_driver_sql("SELECT count(*) FROM queue")
            with hard.write() as transaction:
                transaction.session.execute(text("DELETE FROM queue WHERE status = 'queued'"))
        elif "postponed" in hindrance:
            fill(hard, 100_000, ten_minutes_ago, wait_s=3600)
        else:
            fill(hard, 1_000_000, ten_minutes_ago)
        fill(hard, WARM_UP + CLAIMS)
        found = measured(hard)
    report(f"a claim: {hindrance}", **found.report(), alone=alone.report(), goal_p99_ms=20)
