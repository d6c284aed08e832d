"""No job is lost, duplicated or left incomplete when a worker, the broker or the API fails."""

import hashlib
import signal
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import func, select, update
from standardwebhooks import Webhook

from tests.acceptance.installation import WEBHOOK_SECRET, distributed, working
from tests.integration.installation import Installation, Server
from tests.integration.webhooks.receiver import Receiver, receiving
from tests.services.process import Running
from tests.services.redis import Redis
from tests.services.s3 import Bucket
from tests.waiting import wait_until
from zcore.jobs.database import Database
from zcore.jobs.models import Event, Job, Leftover, Output, QueueEntry
from zcore.jobs.states import State

pytestmark = pytest.mark.acceptance

JOBS = 100
STEPS = 24  # an image takes long enough for the worker to be killed during it
LEASE_S = 5
COLORS = ("red", "green", "blue", "yellow", "purple")


@pytest.fixture
def installation(tmp_path: Path, database_url: str, redis_url: str, s3: Bucket) -> Installation:
    # A delivery that a killed deliverer had claimed is due again after three times the timeout.
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


def test_each_of_a_hundred_jobs_succeeds_once_despite_a_killed_worker_a_flushed_redis_and_a_restarted_api(
    installation: Installation, database: Database, receiver: Receiver, redis: Redis, s3: Bucket
) -> None:
    with installation.serving() as server, working(installation, server, 2) as (doomed, _survivor):
        ids = submit(server, receiver, range(JOBS // 2))
        orphan = kill_during_a_job(doomed, database)
        redis.flush()
        assert count(database, State.QUEUED) > 0, "Redis has to be flushed while jobs wait"
        wait_until(lambda: "rescued" in event_types(database, orphan), timeout_s=6 * LEASE_S)
        server.running.stop(signal.SIGKILL)
        with installation.serving() as restarted:
            ids += submit(restarted, receiver, range(JOBS // 2, JOBS))
            wait_until(lambda: count(database, State.SUCCEEDED) == JOBS, timeout_s=400, every_s=0.25)
            wait_until(lambda: len({post.headers["webhook-id"] for post in receiver.requests}) >= JOBS, timeout_s=60)
            wait_for_images_only(database, s3)

    assert len(set(ids)) == JOBS
    assert_each_succeeded_once(database, ids)
    assert_storage_holds_exactly_the_outputs(database, s3)
    assert_one_webhook_per_job(receiver, ids)


def submit(server: Server, receiver: Receiver, numbers: range) -> list[str]:
    ids: list[str] = []
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for number in numbers:
            body = {
                "prompt": f"a {COLORS[number % len(COLORS)]} circle",
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


def kill_during_a_job(worker: Running, database: Database) -> str:
    """Send SIGKILL to this worker during a job. Return the job, which stays RUNNING."""

    def running_job() -> str:
        with database.read() as transaction:
            found = transaction.session.scalars(
                select(QueueEntry.job_id).where(
                    QueueEntry.status == State.RUNNING,
                    QueueEntry.worker.endswith(f":{worker.process.pid}"),
                )
            ).first()
            return str(found or "")

    wait_until(running_job, timeout_s=60, every_s=0.002)
    worker.stop(signal.SIGKILL)
    return wait_until(running_job, timeout_s=1)


def count(database: Database, state: State) -> int:
    with database.read() as transaction:
        return transaction.session.scalar(select(func.count()).select_from(Job).where(Job.stored_status == state)) or 0


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


def wait_for_images_only(database: Database, s3: Bucket) -> None:
    """Wait until the killed worker's images are deleted too, as if the delay of deletions were over."""
    with database.write() as transaction:
        transaction.session.execute(update(Leftover).values(due_at=transaction.now))
    wait_until(lambda: len(stored(s3)) == JOBS, timeout_s=60)


def stored(s3: Bucket) -> list[str]:
    with s3.client() as client:
        return [entry.get("Key", "") for entry in client.list_objects_v2(Bucket=s3.name).get("Contents", [])]


def assert_storage_holds_exactly_the_outputs(database: Database, s3: Bucket) -> None:
    with database.read() as transaction:
        outputs = {row.key: row.sha256 for row in transaction.session.scalars(select(Output))}
    assert len(outputs) == JOBS
    with s3.client() as client:
        found = {
            key: hashlib.sha256(client.get_object(Bucket=s3.name, Key=key)["Body"].read()).hexdigest()
            for key in stored(s3)
        }
    assert found == outputs


def assert_one_webhook_per_job(receiver: Receiver, ids: list[str]) -> None:
    job_ids: dict[str, str] = {}
    for post in receiver.requests:
        event = Webhook(WEBHOOK_SECRET).verify(post.body, dict(post.headers))
        assert event["type"] == "job.succeeded"
        job_ids[post.headers["webhook-id"]] = event["data"]["id"]
    assert Counter(job_ids.values()) == Counter(ids)
