"""How long does the migration of a large installation take, and what can the service do meanwhile?

Method: a database at revision 0008 is filled with the jobs of `tests/history.py`, 10^6 on PostgreSQL and 200,000 on
SQLite, and `alembic upgrade head` runs in this process. Reported: seconds and CPU seconds of each revision, the WAL.
On PostgreSQL two probes submit a job and look it up, each 100 ms after the last answer and with the limits of the
service: one with the statements of revision 0008, one with the code of this version. What they met, in the order in
which it changed, says how long the service is away; the exclusive locks that are seen meanwhile say why.
"""

import logging
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from alembic import command

from tests.benchmarks import cpu
from tests.benchmarks.report import report
from tests.history import History
from tests.integration.jobs.examples import fetch, submit
from tests.integration.jobs.test_migrations import settings_of_alembic
from tests.services.postgres import Postgres
from zcore.jobs.database import Database, DatabaseError, IdSource, temporary_fault

pytestmark = [pytest.mark.benchmarks, pytest.mark.timeout(7200)]

BEFORE = "0008"
POSTGRESQL_JOBS = 1_000_000
SQLITE_JOBS = 200_000
INTERVAL_S = 0.1
OLD_SUBMISSION: LiteralString = """
INSERT INTO jobs
SELECT (jsonb_populate_record(
    NULL::jobs, to_jsonb(job) || jsonb_build_object('id', %s::text, 'idempotency_key', NULL)
)).*
FROM (SELECT * FROM jobs ORDER BY id LIMIT 1) AS job
"""
OLD_LIMITS: LiteralString = "BEGIN; SET LOCAL lock_timeout = 3000; SET LOCAL statement_timeout = 5000"
EXCLUSIVE: LiteralString = """
SELECT relname, pid FROM pg_locks JOIN pg_class ON pg_class.oid = relation
WHERE mode = 'AccessExclusiveLock' AND granted AND relkind IN ('r', 'p')
"""


@dataclass
class Probe:
    """Does something again and again, and remembers what came of it."""

    name: str
    act: Callable[[], str]
    phases: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Each result with the number of times in a row, the seconds since the beginning, and the longest it took."""

    def run(self, began: float, ended: threading.Event) -> None:
        """Act until the event is set, and once more."""
        last = False
        while not last:
            last = ended.wait(INTERVAL_S)
            started = time.monotonic()
            result = self.act()
            took = time.monotonic() - started
            if not self.phases or self.phases[-1]["result"] != result:
                self.phases.append(
                    {"result": result, "from_s": round(started - began, 1), "times": 0, "longest_s": 0.0}
                )
            self.phases[-1]["times"] += 1
            self.phases[-1]["longest_s"] = max(self.phases[-1]["longest_s"], round(took, 3))


class Revisions(logging.Handler):
    """The moments at which Alembic began each revision, in elapsed and in CPU time of this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[tuple[str, float, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Remember the revision that a line of Alembic's log names."""
        if "Running upgrade" in record.getMessage():
            self.add(record.getMessage().partition("-> ")[2].partition(",")[0])

    def add(self, name: str) -> None:
        """Remember that something begins now."""
        self.begun.append((name, time.monotonic(), cpu.client_ms() / 1000))

    def report(self) -> dict[str, dict[str, float]]:
        """Return the seconds of each revision."""
        pairs = zip(self.begun, self.begun[1:], strict=False)
        return {
            name: {"s": round(until - since, 1), "client_cpu_s": round(cpu_until - cpu_since, 1)}
            for (name, since, cpu_since), (_, until, cpu_until) in pairs
        }


@contextmanager
def revisions() -> Generator[Revisions]:
    """Collect the revisions that Alembic begins during the block."""
    found, logger = Revisions(), logging.getLogger("alembic.runtime.migration")
    level = logger.level
    logger.addHandler(found)
    logger.setLevel(logging.INFO)
    try:
        yield found
    finally:
        logger.removeHandler(found)
        logger.setLevel(level)


class Locks:
    """Which tables were seen exclusively locked by another connection, from when to when, and its CPU time."""

    def __init__(self, url: str) -> None:
        self._connection = psycopg.connect(url, autocommit=True)
        self.seen: dict[str, list[float]] = {}
        self.cpu_s = 0.0

    def look(self) -> str:
        """Look at the locks of this moment."""
        now = time.monotonic()
        for table, process in self._connection.execute(EXCLUSIVE).fetchall():
            self.seen.setdefault(str(table), [now, now])[1] = now
            self.cpu_s = max(self.cpu_s, cpu.server_ms(process) / 1000)
        return "looked"

    def report(self) -> dict[str, float]:
        """Return for how many seconds each table was seen locked."""
        return {table: round(last - first, 1) for table, (first, last) in sorted(self.seen.items())}


def with_the_old_statements(url: str) -> Callable[[], str]:
    """Return an action that submits and looks up as the version of revision 0008 did."""
    connection, ids = psycopg.connect(url, autocommit=True), IdSource()

    def act() -> str:
        job_id = ids.new(datetime.now(UTC)).hex
        try:
            connection.execute(OLD_LIMITS)
            connection.execute(OLD_SUBMISSION, (job_id,))
            connection.execute("COMMIT")
            connection.execute("SELECT prompt FROM jobs WHERE id = %s", (job_id,)).fetchone()
        except psycopg.Error as error:
            connection.execute("ROLLBACK")
            return type(error).__name__
        return "accepted"

    return act


def with_this_version(database: Database) -> Callable[[], str]:
    """Return an action that submits and looks up as this version does."""

    def act() -> str:
        try:
            fetch(database, submit(database).id)
        except DatabaseError as error:
            return temporary_fault(error) or type(error).__name__
        return "accepted"

    return act


def test_migration_on_postgresql(postgres: Postgres) -> None:
    with postgres.database() as url, closing(Database(url)) as database:
        plain = url.replace("+psycopg", "")
        prepare(url, POSTGRESQL_JOBS)
        locks = Locks(plain)
        probes = [
            Probe("statements of 0008", with_the_old_statements(plain)),
            Probe("this version", with_this_version(database)),
            Probe("locks", locks.look),
        ]
        began, ended, wal = time.monotonic(), threading.Event(), wal_position(plain)
        threads = [threading.Thread(target=probe.run, args=(began, ended)) for probe in probes]
        for thread in threads:
            thread.start()
        try:
            steps = upgrade(url)
        finally:
            ended.set()
            for thread in threads:
                thread.join()
        report(
            f"migration of {POSTGRESQL_JOBS:,} jobs on PostgreSQL",
            revisions=steps,
            server_cpu_s=round(locks.cpu_s, 1),
            wal_bytes=wal_position(plain) - wal,
            exclusive_locks_s=locks.report(),
            **{probe.name: probe.phases for probe in probes[:2]},
        )


def test_migration_on_sqlite(tmp_path: Path) -> None:
    path = tmp_path / "zimage.db"
    url = f"sqlite:///{path}"
    prepare(url, SQLITE_JOBS)
    before = path.stat().st_size
    steps = upgrade(url)
    report(
        f"migration of {SQLITE_JOBS:,} jobs on SQLite", revisions=steps, bytes_of_the_file=[before, path.stat().st_size]
    )


def prepare(url: str, jobs: int) -> None:
    """Fill an empty database."""
    command.upgrade(settings_of_alembic(url), BEFORE)
    History(jobs).fill(url)


def upgrade(url: str) -> dict[str, dict[str, float]]:
    """Migrate, and return the seconds of each revision."""
    with revisions() as found:
        command.upgrade(settings_of_alembic(url), "head")
        found.add("end")
    return found.report()


def wal_position(url: str) -> int:
    """Return how many bytes of WAL the server has written so far."""
    with psycopg.connect(url) as connection:
        [position] = connection.execute("SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint").fetchone() or [0]
        return int(position)
