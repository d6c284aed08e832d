"""What a job costs PostgreSQL, in exact counters: transactions, bytes of WAL, HOT updates, pages that a claim reads.

The server of the tests writes no full pages, so the WAL of a statement does not depend on the last checkpoint.
"""

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from statistics import median
from typing import Any

import pytest
from sqlalchemy import Connection, event
from sqlalchemy.engine.interfaces import CacheStats

from tests.integration.jobs.examples import LEASE_S, Clock, claim, submit
from tests.services.postgres import Postgres
from tests.waiting import wait_until
from zcore.jobs import claims, lifecycle, queries, search, workers
from zcore.jobs.claims import Lease
from zcore.jobs.database import Database
from zcore.jobs.models import Job
from zcore.stages import Stage

WAL_LIMIT_BYTES = 4096
SEARCH_LIMIT_BYTES = 224
"""The index of the search, for a short prompt. A long one costs up to 3 KiB; see `tests/benchmarks/LOG.md`."""
ENCODING_LIMIT_BYTES = 1536
JOBS = 21
HEARTBEATS = 200
WORKERS, REPORTS = 300, 5
ENGINE = {"model": "Z-Image-Turbo", "torch": "2.13.0", "device": "NVIDIA H100", "transformer_dtype": "bfloat16"}
METRICS = {"queue_ms": 55, "encode_ms": 35, "denoise_ms": 1480, "decode_ms": 69, "upload_ms": 94, "total_ms": 1733}
PROMPT = "A fox in deep snow at dusk, soft light, 35 mm film photograph"


@pytest.fixture
def record(postgres: Postgres, migrated_template: str) -> Iterator[Database]:
    """A database of its own, because the counters include dead rows of earlier tests."""
    with postgres.database(migrated_template) as url, closing(Database(url, clock=Clock())) as database:
        yield database


@contextmanager
def observer(database: Database) -> Iterator[Connection]:
    """Open a connection whose statements are transactions of their own."""
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        yield connection


def wal_bytes(database: Database, work: Callable[[], Any]) -> int:
    """Return how many bytes of WAL `work` writes."""
    with observer(database) as connection:
        before = connection.exec_driver_sql("SELECT pg_current_wal_insert_lsn()").scalar_one()
        work()
        return int(
            connection.exec_driver_sql(
                "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), %s::pg_lsn)", (before,)
            ).scalar_one()
        )


def next_transaction(database: Database) -> int:
    """Return the number of the next transaction that writes."""
    with observer(database) as connection:
        return int(connection.exec_driver_sql("SELECT pg_snapshot_xmax(pg_current_snapshot())::text").scalar_one())


def succeed(database: Database, lease: Lease) -> None:
    with database.write() as transaction:
        image = lifecycle.StoredOutput(
            0, f"jobs/{lease.job_id}/1-0.png", "png", 1024, 1024, 1_543_210, "a" * 64, 2**40 + 7
        )
        lifecycle.complete(transaction, lease, [image], METRICS, ENGINE, 86_400)


def one_job(database: Database) -> dict[str, int]:
    """Process one job, and return the bytes of WAL of each step."""
    leases: list[Lease] = []
    return {
        "submit": wal_bytes(database, lambda: submit(database, prompt=PROMPT, owner="project-7")),
        "claim": wal_bytes(database, lambda: leases.append(claim(database, "gpu-host-17:4711"))),
        "complete": wal_bytes(database, lambda: succeed(database, leases[0])),
    }


def test_a_job_costs_three_transactions_and_four_kib_of_wal_beside_its_search_index(record: Database) -> None:
    one_job(record)
    jobs = []
    transactions = next_transaction(record)
    for _ in range(JOBS):
        jobs.append(one_job(record))
    assert next_transaction(record) - transactions == 3 * JOBS
    steps = {name: median(job[name] for job in jobs) for name in jobs[0]}
    assert median(sum(job.values()) for job in jobs) <= WAL_LIMIT_BYTES + SEARCH_LIMIT_BYTES, steps


def test_a_job_without_a_search_index_costs_four_kib_of_wal(record: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "add", lambda *_: None)
    one_job(record)
    jobs = [one_job(record) for _ in range(JOBS)]
    steps = {name: median(job[name] for job in jobs) for name in jobs[0]}
    assert median(sum(job.values()) for job in jobs) <= WAL_LIMIT_BYTES, steps


def test_completing_the_encoding_does_not_rewrite_the_job(record: Database) -> None:
    def place_of_row(job_id: uuid.UUID) -> str:
        with observer(record) as connection:
            return str(connection.exec_driver_sql("SELECT ctid FROM jobs WHERE id = %s", (job_id,)).scalar_one())

    def encode() -> int:
        job = submit(record, stage=Stage.ENCODE, prompt=PROMPT * 20)
        lease = claim(record, "cpu-1", [Stage.ENCODE])

        def complete() -> None:
            with record.write() as transaction:
                assert lifecycle.complete_encoding(transaction, lease, METRICS, ENGINE) is not None

        before = place_of_row(job.id)
        written = wal_bytes(record, complete)
        assert place_of_row(job.id) == before
        return written

    encode()
    written = median(encode() for _ in range(JOBS))
    assert written < ENCODING_LIMIT_BYTES


def test_no_statement_of_a_job_is_compiled_again(record: Database) -> None:
    """SQLAlchemy compiles a statement whose form it cannot compare at each use: for a claim that took 4 ms."""
    one_job(record)
    cached: list[tuple[str, CacheStats]] = []

    def remember(_connection: Any, _cursor: Any, statement: str, _parameters: Any, context: Any, _many: bool) -> None:
        if context.compiled is not None:
            cached.append((statement, context.cache_hit))

    event.listen(record.engine, "before_cursor_execute", remember)
    one_job(record)
    event.remove(record.engine, "before_cursor_execute", remember)
    assert len(cached) > 8
    assert [statement for statement, hit in cached if hit is not CacheStats.CACHE_HIT] == []


def test_heartbeats_rewrite_no_index(record: Database) -> None:
    """Each new version of the row stays in its page (HOT), so it costs no index entry and leaves none behind."""
    for _ in range(3):
        submit(record)
    lease = claim(record)
    hot_before = hot_updates(record, after=1)

    def renew() -> None:
        for step in range(HEARTBEATS):
            with record.write() as transaction:
                assert claims.heartbeat(transaction, lease, LEASE_S, ("denoise", step, HEARTBEATS)) is not None

    written = wal_bytes(record, renew)
    assert hot_updates(record, after=1 + HEARTBEATS) - hot_before == HEARTBEATS
    assert written / HEARTBEATS < 300


def test_reports_of_presence_rewrite_no_index(record: Database) -> None:
    """However many workers there are, the next report of each finds space in the page of its row."""

    def report_all() -> None:
        with record.write() as transaction:
            for number in range(WORKERS):
                workers.report(transaction, f"gpu-host-{number}:4711", "Z-Image-Turbo", "NVIDIA H100")

    for _ in range(1 + REPORTS):
        report_all()
    updates = WORKERS * REPORTS
    assert hot_updates(record, after=updates, table="workers") == updates


def hot_updates(database: Database, after: int, table: str = "queue") -> int:
    """Return how many of the first `after` updates of the table were HOT."""
    database.close()  # a connection reports what it counted at the latest when it ends

    def counted() -> tuple[int, int]:
        with observer(database) as connection:
            updates, hot = connection.exec_driver_sql(
                "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = %s", (table,)
            ).one()
            return updates, hot

    wait_until(lambda: counted()[0] >= after)
    return counted()[1]


def test_looking_for_a_cancellation_request_writes_nothing(record: Database) -> None:
    submit(record)
    lease = claim(record)

    def look() -> None:
        with record.write() as transaction:
            assert claims.cancellation_requested(transaction, lease) is False

    transactions = next_transaction(record)
    assert wal_bytes(record, look) == 0
    assert next_transaction(record) == transactions


DEAD = """
INSERT INTO queue (job_id, owner, status, stage, priority, position, scheduled, available_at, attempt, attempts_left,
                   isolated, progress_step, progress_steps)
SELECT id, 'anna', 'queued', 'generate', 0, id, false, now(), 0, 3, false, 0, 0
FROM (SELECT (lpad(to_hex(n), 12, '0') || '70008000000000000000')::uuid AS id FROM generate_series(1, 5000) AS n) AS ids
"""


def test_a_claim_reads_no_entries_of_jobs_that_have_left_the_queue(record: Database) -> None:
    """A snapshot that is held, as by a backup, keeps PostgreSQL from removing them from the index."""
    with observer(record) as connection, record.engine.connect() as backup:
        connection.exec_driver_sql(DEAD)
        backup.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        backup.exec_driver_sql("SELECT count(*) FROM queue")
        connection.exec_driver_sql("DELETE FROM queue")
        submit(record)
        unbounded = pages_of_a_claim(record)
        with record.write() as transaction:
            claims.advance_marks(transaction)
        assert pages_of_a_claim(record) < 250 < unbounded


def test_a_queue_position_reads_no_entries_of_jobs_that_have_left_the_queue(record: Database) -> None:
    with observer(record) as connection, record.engine.connect() as backup:
        connection.exec_driver_sql(DEAD)
        backup.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        backup.exec_driver_sql("SELECT count(*) FROM queue")
        connection.exec_driver_sql("DELETE FROM queue")
        job = submit(record)
        unbounded = pages_of_positions(record, job)
        with record.write() as transaction:
            claims.advance_marks(transaction)
        for pages, dead in zip(pages_of_positions(record, job), unbounded, strict=True):
            assert pages < 250 < dead


def pages_of_positions(database: Database, job: Job) -> list[int]:
    """Return how many pages PostgreSQL reads to find the position of a job, alone and in a list."""
    asked: list[tuple[str, Any]] = []

    def remember(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        asked.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", remember)
    with database.read() as transaction:
        assert queries.queue_position(transaction, job) == 1
        assert queries.queue_positions(transaction, [job]) == {job.id: 1}
    event.remove(database.engine, "before_cursor_execute", remember)
    return [pages_of(database, *one) for one in asked if "queue" in one[0]]


def pages_of_a_claim(database: Database) -> int:
    """Return how many pages PostgreSQL reads to find the next job. Claims none."""
    asked: list[tuple[str, Any]] = []

    def remember(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        asked.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", remember)
    with database.write() as transaction:
        assert claims.claim(transaction, "worker-1", LEASE_S) is not None
        transaction.session.rollback()
    event.remove(database.engine, "before_cursor_execute", remember)
    [found] = [one for one in asked if one[0].startswith("UPDATE queue")]
    return pages_of(database, *found)


def pages_of(database: Database, statement: str, parameters: Any) -> int:
    """Return how many pages PostgreSQL reads for a statement. It is executed, and rolled back."""
    with database.engine.connect() as connection:
        plan = connection.exec_driver_sql(
            f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", parameters
        ).scalar_one()
    top = (plan if isinstance(plan, list) else json.loads(plan))[0]["Plan"]
    return int(top["Shared Hit Blocks"] + top["Shared Read Blocks"])
