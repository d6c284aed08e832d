"""Nothing is lost, doubled or half-done, whoever is killed."""

import hashlib
import signal
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import func, select
from standardwebhooks import Webhook

from tests.acceptance.installation import WEBHOOK_SECRET, distributed, working
from tests.integration.installation import Installation, Server
from tests.integration.webhooks.receiver import Receiver, receiving
from tests.services.process import Running
from tests.services.redis import Redis
from tests.services.s3 import Bucket
from tests.waiting import wait_until
from zcore.jobs.database import Database
from zcore.jobs.models import Event, Job, Output
from zcore.jobs.states import State

pytestmark = pytest.mark.acceptance

JOBS = 100
STEPS = 24  # a picture takes long enough to be killed in
LEASE_S = 5
COLOURS = ("red", "green", "blue", "yellow", "purple")


@pytest.fixture
def installation(tmp_path: Path, database_url: str, redis_url: str, s3: Bucket) -> Installation:
    # A delivery that its deliverer took with it is due again after three times the webhooks' timeout.
    settings = {"jobs.lease_s": LEASE_S, "webhooks.timeout_s": 4}
    return distributed(tmp_path, database_url, redis_url, s3, settings)


@pytest.fixture
def database(database_url: str) -> Generator[Database]:
    opened = Database(database_url)
    yield opened
    opened.close()


@pytest.fixture
def receiver() -> Generator[Receiver]:
    with receiving() as opened:
        yield opened


def test_a_hundred_jobs_end_once_each_though_a_worker_is_killed_redis_is_flushed_and_the_api_is_restarted(
    installation: Installation, database: Database, receiver: Receiver, redis: Redis, s3: Bucket
) -> None:
    with installation.serving() as server, working(installation, server, 2) as (doomed, _survivor):
        ids = submit(server, receiver, range(JOBS // 2))
        orphan = kill_in_mid_job(doomed, database)
        redis.flush()
        assert count(database, State.QUEUED) > 0, "Redis has to be flushed while jobs wait"
        wait_until(lambda: "rescued" in event_types(database, orphan), timeout_s=6 * LEASE_S)
        server.running.stop(signal.SIGKILL)
        with installation.serving() as restarted:
            ids += submit(restarted, receiver, range(JOBS // 2, JOBS))
            wait_until(lambda: count(database, State.SUCCEEDED) == JOBS, timeout_s=400, every_s=0.25)
            wait_until(lambda: len({post.headers["webhook-id"] for post in receiver.told}) >= JOBS, timeout_s=60)

    assert len(set(ids)) == JOBS
    assert_each_succeeded_once(database, ids)
    assert_every_object_is_there_and_no_other(database, s3)
    assert_told_of_each_job(receiver, ids)


def submit(server: Server, receiver: Receiver, numbers: range) -> list[str]:
    ids: list[str] = []
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for number in numbers:
            body = {
                "prompt": f"a {COLOURS[number % len(COLOURS)]} circle",
                "width": 64,
                "height": 128,
                "steps": STEPS,
                "seed": number,
                "webhook_url": receiver.url,
                "metadata": {"number": number},
            }
            answer = client.post("/api/generate", json=body)
            assert answer.status_code == 202, answer.text
            ids.append(answer.json()["id"])
    return ids


def kill_in_mid_job(worker: Running, database: Database) -> str:
    """SIGKILL while this worker paints; gives the job, RUNNING in its name with nobody behind it."""

    def painted_by_it() -> str:
        with database.read() as transaction:
            found = transaction.session.scalars(
                select(Job.id).where(
                    Job.status == State.RUNNING,
                    Job.worker.endswith(f":{worker.process.pid}"),
                )
            ).first()
            return str(found or "")

    wait_until(painted_by_it, timeout_s=60, every_s=0.002)
    worker.stop(signal.SIGKILL)
    return wait_until(painted_by_it, timeout_s=1)


def count(database: Database, state: State) -> int:
    with database.read() as transaction:
        return transaction.session.scalar(select(func.count()).select_from(Job).where(Job.status == state)) or 0


def event_types(database: Database, job_id: str) -> list[str]:
    with database.read() as transaction:
        return [
            row.type
            for row in transaction.session.scalars(select(Event).order_by(Event.id))
            if str(row.job_id) == job_id
        ]


def assert_each_succeeded_once(database: Database, ids: list[str]) -> None:
    with database.read() as transaction:
        succeeded = Counter(
            str(row.job_id) for row in transaction.session.scalars(select(Event).where(Event.type == "succeeded"))
        )
    assert succeeded == Counter(ids)


def assert_every_object_is_there_and_no_other(database: Database, s3: Bucket) -> None:
    with database.read() as transaction:
        outputs = {row.key: row.sha256 for row in transaction.session.scalars(select(Output))}
    assert len(outputs) == JOBS
    with s3.client() as client:
        keys = [entry.get("Key", "") for entry in client.list_objects_v2(Bucket=s3.name).get("Contents", [])]
        stored = {
            key: hashlib.sha256(client.get_object(Bucket=s3.name, Key=key)["Body"].read()).hexdigest() for key in keys
        }
    assert stored == outputs


def assert_told_of_each_job(receiver: Receiver, ids: list[str]) -> None:
    told: dict[str, str] = {}
    for post in receiver.told:
        event = Webhook(WEBHOOK_SECRET).verify(post.body, dict(post.headers))
        assert event["type"] == "job.succeeded"
        told[post.headers["webhook-id"]] = event["data"]["id"]
    assert Counter(told.values()) == Counter(ids)
