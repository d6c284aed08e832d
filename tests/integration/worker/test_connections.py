"""A worker's threads share one connection, or two: a fleet must not use up those of the database server."""

import re
import threading
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text

from tests.integration.worker.conftest import Environment, open_storage
from worker.app import CONNECTIONS, CONNECTIONS_WITH_MAINTENANCE
from worker.presence import Presence
from worker.shutdown import Shutdown
from zcore.jobs.database import Database, Transaction
from zcore.request import GenerationRequest
from zcore.settings import load_settings
from zcore.stages import Stage

OTHERS = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"


API_PROCESSES = 4
WORKERS = 50
MAINTENANCE_PROCESSES = 3
TREE = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(("maintains", "limit"), [(False, CONNECTIONS), (True, CONNECTIONS_WITH_MAINTENANCE)])
def test_a_busy_worker_with_all_its_threads_keeps_within_its_connections(
    database_url: str, tmp_path: Path, maintains: bool, limit: int
) -> None:
    """And no thread opens a transaction within another: with one connection it would wait for itself."""
    storage = open_storage(tmp_path)
    storage.prepare()
    shutdown = Shutdown(0)
    connections: list[int] = []
    held: Counter[int] = Counter()
    held_at_most: Counter[int] = Counter()

    def checkout(*_: Any) -> None:
        thread = threading.get_ident()
        held[thread] += 1
        held_at_most[thread] = max(held_at_most[thread], held[thread])

    def checkin(*_: Any) -> None:
        held[threading.get_ident()] -= 1

    with (
        closing(Database(database_url, pool_size=1, overflow=limit - 1)) as database,
        closing(Database(database_url, pool_size=1)) as observer,
    ):
        event.listen(database.engine, "checkout", checkout)
        event.listen(database.engine, "checkin", checkin)
        environment = Environment(database, storage)

        def count_connections(_request: GenerationRequest, _step: int) -> None:
            with observer.read() as transaction:
                connections.append(transaction.session.scalars(text(OTHERS)).one())

        environment.pipeline.before_step = count_connections
        jobs = [environment.submit(steps=10) for _ in range(10)]
        worker, _ = environment.image_worker()
        maintenance = environment.maintenance(shutdown)
        presence = Presence(database, "worker-1", "a model", "cpu", tuple(Stage), shutdown, worker.cache_counts)
        if maintains:
            maintenance.start()
        presence.start()
        worker.drain()
        worker.finish()
        shutdown.begin()
        presence.stop()
        if maintains:
            maintenance.stop()
        assert {environment.job(job).status for job in jobs} == {"succeeded"}
    assert len(held_at_most) >= 3  # more threads than connections
    assert set(held_at_most.values()) == {1}
    assert max(connections) <= limit


def test_the_documented_fleet_keeps_within_the_connections_of_a_server_without_settings(database_url: str) -> None:
    """Even if every process has all its connections open. A few are left for an operator, and some are reserved."""
    api = API_PROCESSES * load_settings({}).database.pool_size
    others = WORKERS * CONNECTIONS + MAINTENANCE_PROCESSES * CONNECTIONS_WITH_MAINTENANCE
    with closing(Database(database_url)) as database, database.read() as transaction:
        default = select_int(transaction, "SELECT boot_val FROM pg_settings WHERE name = 'max_connections'")
        reserved = select_int(
            transaction, "SELECT boot_val FROM pg_settings WHERE name = 'superuser_reserved_connections'"
        )
    assert api + others <= default - reserved - 5
    documented = re.sub(r"\s+", " ", (TREE / "docs" / "settings.md").read_text())
    assert (
        f"{API_PROCESSES} API processes, {WORKERS} workers and {MAINTENANCE_PROCESSES} processes for maintenance"
        in documented
    )
    assert f"open at most {api + others} connections" in documented


def select_int(transaction: Transaction, question: str) -> int:
    return int(transaction.session.scalars(text(question)).one())
