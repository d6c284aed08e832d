"""The API while PostgreSQL's processes are stopped: connections stay open, and nothing is answered."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import httpx
import pytest
from sqlalchemy import text

from tests.conftest import migrate
from tests.integration.installation import Installation, Server, events
from tests.services import postgres as postgres_server
from tests.services.service import Service
from tests.waiting import wait_until
from zcore.jobs.database import Database

LIMIT_S = 10
"""How long a request may take, whatever the database does, without the time that it asks to wait."""
WAIT_S = 3


@dataclass(frozen=True)
class Freezable:
    """A server, the installation with its database, and the PostgreSQL that it uses alone."""

    server: Server
    installation: Installation
    service: Service

    def post(self, wait_s: int = 0) -> httpx.Response:
        """Submit a job."""
        headers = {"prefer": f"wait={wait_s}"} if wait_s else {}
        url = f"{self.server.url}/api/generate"
        return httpx.post(url, json={"prompt": "a fox"}, headers=headers, timeout=LIMIT_S + wait_s)

    def get(self, path: str) -> httpx.Response:
        """Send a GET request."""
        return httpx.get(f"{self.server.url}{path}", timeout=LIMIT_S)

    def active(self) -> int:
        """Return how many connections of this server its PostgreSQL has."""
        with self.installation.database() as database, database.read() as transaction:
            others = "SELECT count(*) FROM pg_stat_activity WHERE client_port > 0 AND pid <> pg_backend_pid()"
            return transaction.session.scalars(text(others)).one()


@pytest.fixture(scope="module")
def freezable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Freezable]:
    """One server and one PostgreSQL for the tests of this module."""
    with postgres_server.restartable() as (postgres, service):
        url = postgres.url.render_as_string(hide_password=False)
        migrate(url)
        installation = Installation(tmp_path_factory.mktemp("freezable"), {"database.url": url})
        with installation.serving() as server:
            yield Freezable(server, installation, service)


def test_an_api_process_never_has_more_connections_than_its_setting_says(freezable: Freezable) -> None:
    with ThreadPoolExecutor(50) as pool:
        answers = [future.result() for future in [pool.submit(freezable.post) for _ in range(50)]]
    assert {answer.status_code for answer in answers} == {202}
    assert freezable.active() <= freezable.installation.settings.database.pool_size


def test_every_request_is_answered_while_the_database_is_frozen(freezable: Freezable) -> None:
    job = freezable.post().json()["id"]
    requests: list[Callable[[], httpx.Response]] = [
        freezable.post,
        lambda: freezable.get(f"/api/jobs/{job}"),
        lambda: freezable.get("/health/ready"),
    ]
    with ThreadPoolExecutor(40) as pool:
        waiting = pool.submit(freezable.post, WAIT_S)
        wait_until(lambda: freezable.get("/api/jobs?limit=1").json()["jobs"][0]["id"] != job)
        with postgres_server.frozen(freezable.service):
            answers = [future.result() for future in [pool.submit(request) for request in requests * 10]]
            answers.append(waiting.result())
    assert {answer.status_code for answer in answers} == {503}
    codes = {answer.json().get("code", "not ready") for answer in answers}
    assert codes == {"database_unavailable", "not ready"}
    wait_until(lambda: freezable.get("/health/ready").status_code == 200)
    assert freezable.post().status_code == 202


def test_requests_that_wait_for_a_lock_are_answered(freezable: Freezable) -> None:
    with (
        closing(Database(freezable.installation.settings.database_url, limits=None)) as database,
        database.write() as transaction,
        ThreadPoolExecutor(5) as pool,
    ):
        transaction.session.execute(text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"))
        answers = [future.result() for future in [pool.submit(freezable.post) for _ in range(5)]]
    assert {answer.status_code for answer in answers} == {503}
    assert "a lock was not granted in time" in {line.get("reason") for line in events(freezable.server.running)}
