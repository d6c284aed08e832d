"""The durable record behind pgbouncer in transaction mode: each transaction may run in another session."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import pytest
from sqlalchemy import text

from tests.integration.jobs.examples import PERMANENT, claim, complete, events, fail, fetch, rescue, submit
from tests.services import pgbouncer
from tests.services.postgres import Postgres
from zcore.jobs import claims, lifecycle, queries
from zcore.jobs.database import Database, DatabaseError, Limits, temporary_fault
from zcore.jobs.queries import JobFilter

SESSIONS = 2


@pytest.fixture
def pooled_url(postgres: Postgres, database_url: str) -> Iterator[str]:
    """The URL of a migrated database behind a pooler with two connections."""
    with pgbouncer.pooling(postgres, database_url, SESSIONS) as url:
        yield url


@pytest.fixture
def pooled(pooled_url: str) -> Iterator[Database]:
    """Open that database."""
    with closing(Database(pooled_url)) as opened:
        yield opened


def test_jobs_of_many_processes_end_over_two_sessions(pooled_url: str, database_url: str) -> None:
    """More often than the driver would otherwise wait before it prepares a statement for one session."""
    with ExitStack() as stack, closing(Database(database_url)) as direct, ThreadPoolExecutor(8) as pool:
        processes = [stack.enter_context(closing(Database(pooled_url, pool_size=1))) for _ in range(12)]

        def work(database: Database) -> None:
            for _ in range(7):
                submit(database)
                lease = claim(database)
                with database.write() as transaction:
                    assert claims.heartbeat(transaction, lease, 30.0) is not None
                assert complete(database, lease) is not None

        list(pool.map(work, processes))
        with direct.read() as transaction:
            assert transaction.session.scalars(text("SELECT DISTINCT status FROM jobs")).all() == ["succeeded"]
            sessions = text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
            assert transaction.session.scalars(sessions).one() <= SESSIONS + 1


def test_a_job_is_rescued_fails_is_retried_and_is_listed(pooled: Database) -> None:
    job = submit(pooled)
    with pooled.write() as transaction:
        assert claims.claim(transaction, "worker-1", lease_s=0.0) is not None
    assert [rescued.id for rescued in rescue(pooled)] == [job.id]
    fail(pooled, claim(pooled), PERMANENT)
    with pooled.write() as transaction:
        lifecycle.retry(transaction, job.id, max_attempts=3)
    complete(pooled, claim(pooled))
    assert events(pooled, job.id) == [
        "queued", "claimed", "rescued", "claimed", "failed", "retried", "claimed", "succeeded",
    ]  # fmt: skip
    with pooled.read() as transaction:
        assert [found.id for found in queries.page(transaction, JobFilter(), None, 10).jobs] == [job.id]
    assert fetch(pooled, job.id).status == "succeeded"
    assert pooled.unready_reason() is None


def test_limits_hold_for_the_transaction_and_are_not_left_in_the_session(postgres: Postgres, database_url: str) -> None:
    with (
        pgbouncer.pooling(postgres, database_url, pool_size=1) as url,
        closing(Database(url, limits=Limits(statement_s=0.1))) as limited,
        closing(Database(url, limits=None)) as unlimited,
    ):
        with pytest.raises(DatabaseError) as raised, limited.write() as transaction:
            transaction.session.execute(text("SELECT pg_sleep(60)"))
        assert temporary_fault(raised.value) == "a statement took too long"
        with unlimited.read() as transaction:
            assert transaction.session.scalars(text("SHOW statement_timeout")).one() == "0"
