"""A database that is away for longer than a lease: nobody could renew it, so no job is to blame for its worker."""

import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from uuid import UUID

import pytest

from tests.conftest import migrate
from tests.integration.worker.conftest import LEASE_S, Environment, open_storage
from tests.services import postgres as postgres_server
from tests.services.service import Service
from tests.waiting import wait_until
from worker.maintenance.outages import SETTLING_S
from worker.maintenance.scheduler import Maintenance
from worker.shutdown import Shutdown
from zcore.jobs import claims
from zcore.jobs.database import Database, Limits

SHORT = Limits(connect_s=2, lock_s=0.5, statement_s=0.5, answer_s=1, pause_s=0.1)

Outage = Callable[[Service], AbstractContextManager[None]]


@contextmanager
def stopped(service: Service) -> Generator[None]:
    """Let the server be down during the block."""
    service.running.stop(signal.SIGINT)
    try:
        yield
    finally:
        service.running = service.begin()
        service.wait()


@pytest.fixture
def own_server() -> Iterator[tuple[str, Service]]:
    """The URL of a migrated database, and its server, which no other test uses."""
    with postgres_server.restartable() as (postgres, service):
        url = postgres.url.render_as_string(hide_password=False)
        migrate(url)
        yield url, service


def run_alone(maintenance: Maintenance) -> None:
    """Do what is due, and lead no longer: the term is measured by the time of the database, not by that of the test."""
    maintenance.run_once()
    maintenance.leadership.resign()


def rescue(environment: Environment, maintenance: Maintenance, job_id: UUID) -> None:
    """Let maintenance run until it has rescued the job."""

    def is_rescued() -> bool:
        if environment.database.unready_reason() is not None:
            return False
        run_alone(maintenance)
        return environment.job(job_id).status == "queued"

    wait_until(is_rescued)


def lose(environment: Environment) -> None:
    """Let a worker claim the next job and be silent until its lease is over."""
    with environment.database.write() as transaction:
        assert claims.claim(transaction, "worker-9", -1) is not None


@pytest.mark.parametrize("outage", [postgres_server.frozen, stopped])
def test_jobs_whose_lease_ended_during_an_outage_are_neither_isolated_nor_charged(
    own_server: tuple[str, Service], outage: Outage, tmp_path: Path
) -> None:
    url, service = own_server
    now_s = 0.0
    with closing(Database(url, limits=SHORT)) as database:
        environment = Environment(database, open_storage(tmp_path))
        maintenance = environment.maintenance(Shutdown(0), lambda: now_s)
        run_alone(maintenance)
        job_id = environment.submit(max_attempts=1)
        lose(environment)
        with outage(service):
            maintenance.run_once()
            now_s += LEASE_S
            maintenance.run_once()
        rescue(environment, maintenance, job_id)
        job = environment.job(job_id)
        assert (job.isolated, job.attempts_left) == (False, 1)

        now_s += SETTLING_S
        lose(environment)
        rescue(environment, maintenance, job_id)
        assert environment.job(job_id).isolated, "this worker could have renewed its lease"
