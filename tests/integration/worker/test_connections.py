"""A worker's threads share one or two connections: a fleet must not use up those of the database server."""

import threading
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

from sqlalchemy import event, text

from tests.integration.worker.conftest import Environment, open_storage
from worker.app import POOL_OVERFLOW, POOL_SIZE
from worker.presence import Presence
from worker.shutdown import Shutdown
from zcore.jobs.database import Database
from zcore.request import GenerationRequest
from zcore.stages import Stage

OTHERS = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"


def test_a_busy_worker_with_all_its_threads_has_at_most_two_connections(database_url: str, tmp_path: Path) -> None:
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
        closing(Database(database_url, POOL_SIZE, POOL_OVERFLOW)) as database,
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
        maintenance.start()
        presence.start()
        worker.drain()
        worker.finish()
        shutdown.begin()
        presence.stop()
        maintenance.stop()
        assert {environment.job(job).status for job in jobs} == {"succeeded"}
    assert len(held_at_most) >= 3  # more threads than connections
    assert set(held_at_most.values()) == {1}
    assert max(connections) <= POOL_SIZE + POOL_OVERFLOW == 2
