"""The API while its database, broker or storage is unavailable, and while it shuts down."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import make_url, text

from tests.api_description import Description, document_of
from tests.integration.api.conftest import Api, problem
from tests.integration.broker.tcp_proxy import TcpProxy, proxy_to
from tests.integration.installation import Installation, Server, events, has_logged
from tests.services.postgres import Postgres
from tests.services.process import free_port
from tests.services.redis import Redis
from tests.waiting import wait_until
from zcore.jobs import workers

END_OTHERS = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
"""


@dataclass(frozen=True)
class Unreliable:
    """A server that reaches its database and its broker through cables that tests can cut."""

    api: Api
    server: Server
    to_database: TcpProxy
    to_broker: TcpProxy


@pytest.fixture(scope="module")
def unreliable(
    tmp_path_factory: pytest.TempPathFactory, postgres: Postgres, migrated_template: str, redis: Redis
) -> Iterator[Unreliable]:
    """One server for all tests of this module; its storage never answers."""
    assert postgres.url.port is not None
    port = make_url(redis.url).port
    assert port is not None
    with (
        postgres.database(migrated_template) as url,
        proxy_to(postgres.url.port) as to_database,
        proxy_to(port) as to_broker,
    ):
        given = {
            "database.url": make_url(url).set(port=to_database.port).render_as_string(hide_password=False),
            "broker.url": f"redis://127.0.0.1:{to_broker.port}/0",
            "storage.bucket": "images",
            "storage.endpoint_url": f"http://127.0.0.1:{free_port()}",
            "storage.access_key_id": "x",
            "storage.secret_access_key": "x",
        }
        installation = Installation(tmp_path_factory.mktemp("unreliable"), given)
        direct = installation.changed(database__url=url)
        with installation.serving() as server, direct.database() as database, httpx.Client(timeout=60) as client:
            description = Description(document_of(installation.settings))
            api = Api(server.url, database, installation, client, description)
            yield Unreliable(api, server, to_database, to_broker)


def test_submissions_are_accepted_without_storage(unreliable: Unreliable) -> None:
    assert has_logged(unreliable.server.running, "storage.unreachable")
    assert unreliable.api.submit().status_code == 202


@pytest.mark.parametrize("failure", ["cut", "hold"])
def test_a_dead_or_hung_broker_neither_delays_nor_fails_a_submission(unreliable: Unreliable, failure: str) -> None:
    """A hung broker would block each publish for five seconds, which is longer than this client waits."""
    getattr(unreliable.to_broker, failure)()
    try:
        for _ in range(100):  # more than the notifier's queue can hold
            answer = unreliable.api.post("/api/generate", json={"prompt": "no broker"}, timeout=4)
            assert answer.status_code == 202
    finally:
        unreliable.to_broker.plug()


def test_readiness_reports_workers_and_the_database(unreliable: Unreliable) -> None:
    assert unreliable.api.get("/health/ready").json() == {"status": "ok", "database": True, "workers": 0}
    with unreliable.api.database.write() as transaction:
        workers.report(transaction, "worker-1", "demo", "cpu")
    assert unreliable.api.get("/health/ready").json()["workers"] == 1


def test_without_its_database_the_server_is_live_but_not_ready_and_answers_503(unreliable: Unreliable) -> None:
    unreliable.to_database.cut()
    try:
        assert unreliable.api.get("/health/live").status_code == 200
        ready = unreliable.api.get("/health/ready")
        assert (ready.status_code, ready.json()["database"]) == (503, False)
        refused = unreliable.api.submit()
        problem(refused, 503, "database_unavailable")
        assert int(refused.headers["retry-after"]) > 0
        problem(unreliable.api.get("/api/jobs"), 503, "database_unavailable")
    finally:
        unreliable.to_database.plug()
    assert unreliable.api.get("/health/ready").status_code == 200
    assert unreliable.api.submit().status_code == 202


def test_while_its_database_is_read_only_the_server_is_not_ready_and_answers_503(unreliable: Unreliable) -> None:
    """As after a failover, when the address leads to a standby: connections to it must be discarded."""
    queued = unreliable.api.submit().json()["id"]
    name = unreliable.api.database.engine.url.database
    with unreliable.api.database.engine.connect() as connection:
        connection.execute(text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
        connection.commit()
        connection.execute(text(END_OTHERS))
        try:
            for _ in range(3):
                ready = unreliable.api.get("/health/ready")
                assert (ready.status_code, ready.json()["database"]) == (503, False)
                problem(unreliable.api.submit(), 503, "database_unavailable")
                problem(unreliable.api.post(f"/api/jobs/{queued}/cancel"), 503, "database_unavailable")
        finally:
            connection.execute(text(f"ALTER DATABASE {name} RESET default_transaction_read_only"))
            connection.commit()
    assert unreliable.api.post(f"/api/jobs/{queued}/cancel").json()["status"] == "canceled"
    for _ in range(5):
        assert unreliable.api.get("/health/ready").status_code == 200
        assert unreliable.api.submit().status_code == 202
    reasons = [line["reason"] for line in events(unreliable.server.running) if line["event"] == "readiness.failed"]
    assert any(reason.startswith("the database is read-only") for reason in reasons)


def test_without_its_tables_the_server_is_not_ready_and_answers_503(unreliable: Unreliable) -> None:
    """A process may be newer than the tables, until the migration has run."""
    with unreliable.api.database.engine.connect() as connection:
        connection.execute(text("ALTER TABLE jobs RENAME TO jobs_of_another_version"))
        connection.commit()
        try:
            problem(unreliable.api.submit(), 503, "database_unavailable")
        finally:
            connection.execute(text("ALTER TABLE jobs_of_another_version RENAME TO jobs"))
            connection.commit()
    assert unreliable.api.submit().status_code == 202


def test_a_wait_survives_a_database_outage(unreliable: Unreliable) -> None:
    prompt = f"outage {uuid4()}"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: unreliable.api.submit({"prefer": "wait=50"}, prompt=prompt))
        job_id = wait_until(lambda: unreliable.api.get("/api/jobs", params={"text": prompt}).json()["jobs"])[0]["id"]
        unreliable.to_database.cut()
        unreliable.api.succeed(job_id)
        unreliable.to_database.plug()
        assert (waiting.result().status_code, waiting.result().json()["status"]) == (200, "succeeded")


def test_on_sigterm_waiting_requests_are_answered_and_the_server_exits(tmp_path: Path, sqlite_url: str) -> None:
    installation = Installation(tmp_path / "stopping", {"database.url": sqlite_url, "server.shutdown_grace_s": 5})
    with installation.serving() as server, ThreadPoolExecutor(1) as pool:
        url = f"{server.url}/api/generate"
        waiting = pool.submit(lambda: httpx.post(url, json={"prompt": "x"}, headers={"prefer": "wait=60"}, timeout=60))
        wait_until(lambda: httpx.get(f"{server.url}/api/jobs").json()["jobs"])
        server.running.send(signal.SIGTERM)
        answer = waiting.result(timeout=30)
        assert (answer.status_code, answer.json()["status"]) == (202, "queued")
        server.running.process.wait(30)


def test_starting_with_invalid_settings_prints_one_line_and_exits_with_status_2(tmp_path: Path) -> None:
    starts = {
        "name": Installation(tmp_path, {}).start("server", "a", "server.prot=1"),
        "secret": Installation(tmp_path, {"webhooks.secret": "whsec_short"}).start("server", "b"),
    }
    output = {}
    for name, running in starts.items():
        assert running.process.wait(60) == 2
        output[name] = running.last_lines()
    assert "did you mean `server.port`?" in output["name"]
    assert "webhooks.secret" in output["secret"]
    assert "whsec_" in output["secret"]
    assert all("\n" not in lines for lines in output.values()), output
