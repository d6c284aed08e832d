"""The API when what it stands on is slow, dead, or leaving."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import make_url

from tests.integration.api.conftest import Api, problem
from tests.integration.broker.cable import Cable, cable_to
from tests.integration.installation import Installation, Server, told
from tests.services.postgres import Postgres
from tests.services.process import free_port
from tests.services.redis import Redis
from tests.waiting import wait_until
from zcore.jobs import presence


@dataclass(frozen=True)
class Shaky:
    """A server whose database and broker hang on cables."""

    api: Api
    server: Server
    to_database: Cable
    to_broker: Cable


@pytest.fixture(scope="module")
def shaky(
    tmp_path_factory: pytest.TempPathFactory, postgres: Postgres, migrated_template: str, redis: Redis
) -> Iterator[Shaky]:
    """One server for the whole file; its storage never answers at all."""
    assert postgres.url.port is not None
    port = make_url(redis.url).port
    assert port is not None
    with (
        postgres.database(migrated_template) as url,
        cable_to(postgres.url.port) as to_database,
        cable_to(port) as to_broker,
    ):
        given = {
            "database.url": make_url(url).set(port=to_database.port).render_as_string(hide_password=False),
            "broker.url": f"redis://127.0.0.1:{to_broker.port}/0",
            "storage.bucket": "pictures",
            "storage.endpoint_url": f"http://127.0.0.1:{free_port()}",
            "storage.access_key_id": "x",
            "storage.secret_access_key": "x",
        }
        installation = Installation(tmp_path_factory.mktemp("shaky"), given)
        direct = installation.changed(database__url=url)
        with installation.serving() as server, direct.database() as database, httpx.Client(timeout=60) as client:
            yield Shaky(Api(server.url, database, installation, client), server, to_database, to_broker)


def test_a_storage_that_is_not_there_keeps_no_job_from_being_taken(shaky: Shaky) -> None:
    assert told(shaky.server.running, "storage.unreachable")
    assert shaky.api.submit().status_code == 202


@pytest.mark.parametrize("way", ["cut", "hold"])
def test_a_broker_that_is_dead_or_hung_neither_delays_nor_fails_a_submission(shaky: Shaky, way: str) -> None:
    """Hung, it would hold a publisher for five seconds each: more than this client waits."""
    getattr(shaky.to_broker, way)()
    try:
        for _ in range(100):  # more than the bell's own queue holds
            answer = shaky.api.post("/api/generate", json={"prompt": "no bell"}, timeout=4)
            assert answer.status_code == 202
    finally:
        shaky.to_broker.plug()


def test_readiness_counts_workers_and_the_database(shaky: Shaky) -> None:
    assert shaky.api.get("/health/ready").json() == {"status": "ok", "database": True, "workers": 0}
    with shaky.api.database.write() as transaction:
        presence.show(transaction, "worker-1", "demo", "cpu")
    assert shaky.api.get("/health/ready").json()["workers"] == 1


def test_without_its_database_it_lives_is_not_ready_and_says_so_to_callers(shaky: Shaky) -> None:
    shaky.to_database.cut()
    try:
        assert shaky.api.get("/health/live").status_code == 200
        ready = shaky.api.get("/health/ready")
        assert (ready.status_code, ready.json()["database"]) == (503, False)
        refused = shaky.api.submit()
        problem(refused, 503, "database_unavailable")
        assert int(refused.headers["retry-after"]) > 0
        problem(shaky.api.get("/api/jobs"), 503, "database_unavailable")
    finally:
        shaky.to_database.plug()
    assert shaky.api.get("/health/ready").status_code == 200
    assert shaky.api.submit().status_code == 202


def test_who_waits_through_an_outage_of_the_database_gets_the_job(shaky: Shaky) -> None:
    prompt = f"outage {uuid4()}"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: shaky.api.submit({"prefer": "wait=50"}, prompt=prompt))
        job_id = wait_until(lambda: shaky.api.get("/api/jobs", params={"text": prompt}).json()["jobs"])[0]["id"]
        shaky.to_database.cut()
        shaky.api.succeed(job_id)
        shaky.to_database.plug()
        assert (waiting.result().status_code, waiting.result().json()["status"]) == (200, "succeeded")


def test_asked_to_leave_it_answers_who_waits_and_goes(tmp_path: Path, sqlite_url: str) -> None:
    installation = Installation(tmp_path / "leaving", {"database.url": sqlite_url, "server.shutdown_grace_s": 5})
    with installation.serving() as server, ThreadPoolExecutor(1) as pool:
        asked = f"{server.url}/api/generate"
        waiting = pool.submit(
            lambda: httpx.post(asked, json={"prompt": "x"}, headers={"prefer": "wait=60"}, timeout=60)
        )
        wait_until(lambda: httpx.get(f"{server.url}/api/jobs").json()["jobs"])
        server.running.send(signal.SIGTERM)
        answer = waiting.result(timeout=30)
        assert (answer.status_code, answer.json()["status"]) == (202, "queued")
        server.running.process.wait(30)


def test_a_start_with_wrong_settings_is_one_line_and_status_2(tmp_path: Path) -> None:
    starts = {
        "name": Installation(tmp_path, {}).start("server", "a", "server.prot=1"),
        "secret": Installation(tmp_path, {"webhooks.secret": "whsec_short"}).start("server", "b"),
    }
    said = {}
    for name, running in starts.items():
        assert running.process.wait(60) == 2
        said[name] = running.last_lines()
    assert "did you mean `server.port`?" in said["name"]
    assert "webhooks.secret: has to be whsec_" in said["secret"]
    assert all("\n" not in lines for lines in said.values()), said
