"""Split encoding: some workers encode prompts, others generate images, and either kind may be killed.

PostgreSQL, Redis and a bucket connect them. The models are stand-ins, because only the cooperation of the processes is
tested.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import UUID

import httpx
import pytest
from sqlalchemy import update

from tests.acceptance.installation import distributed
from tests.integration.installation import Installation, Server, has_logged
from tests.services.process import Running
from tests.services.s3 import Bucket
from tests.waiting import wait_until
from zcore.jobs import queries, workers
from zcore.jobs.database import Database
from zcore.jobs.models import Job, Leftover
from zcore.stages import Stage

pytestmark = pytest.mark.acceptance

JOBS = 12
UNINTERRUPTED = ["queued", "claimed", "encoded", "claimed", "succeeded"]


@pytest.fixture
def installation(tmp_path: Path, database_url: str, redis_url: str, s3: Bucket) -> Installation:
    """An installation with split encoding and a short lease, so that lost workers are noticed quickly."""
    settings = {
        "jobs.split_encoding": True,
        "jobs.lease_s": 2.0,
        "worker.maintenance_interval_s": 0.2,
        "worker.progress_interval_s": 0.05,
    }
    return distributed(tmp_path, database_url, redis_url, s3, settings)


@contextmanager
def serving_stage(installation: Installation, stage: Stage, name: str) -> Iterator[Running]:
    """Run a worker of this stage alone, and enter the block when it has started."""
    changed = installation.changed(worker__stages=[stage])
    with changed.working(package="tests.integration.worker.stand_ins", name=name) as running:
        wait_until(lambda: has_logged(running, "worker.started"), timeout_s=60)
        yield running


def submit(server: Server) -> UUID:
    answer = httpx.post(f"{server.url}/api/generate", json={"prompt": "a heron", "width": 64, "height": 64, "steps": 4})
    assert answer.status_code == 202
    assert answer.json()["stage"] == "encode"
    return UUID(answer.json()["id"])


def get_job(database: Database, job_id: UUID) -> Job:
    with database.read() as transaction:
        return queries.get(transaction, job_id)


def timeline(database: Database, job_id: UUID) -> list[str]:
    with database.read() as transaction:
        return [event.type for event in queries.timeline(transaction, job_id).events]


def workers_of(database: Database, job_id: UUID) -> list[str]:
    """Return the names of the workers that claimed a job, in order."""
    with database.read() as transaction:
        events = queries.timeline(transaction, job_id).events
    return [event.detail["worker"] for event in events if event.type == "claimed"]


def serving(database: Database) -> dict[str, list[str]]:
    """Return the stages of the present workers, by worker name."""
    with database.read() as transaction:
        return {worker.name: worker.stages for worker in workers.present(transaction)}


def stored(s3: Bucket) -> list[str]:
    with s3.client() as client:
        return sorted(found["Key"] for found in client.list_objects_v2(Bucket=s3.name).get("Contents", []))


def wait_for_images_only(database: Database, s3: Bucket, jobs: list[UUID]) -> None:
    """Wait until the bucket holds each job's image and nothing else, as if the delay of deletions were over."""
    with database.write() as transaction:
        transaction.session.execute(update(Leftover).values(due_at=transaction.now))
    expected = sorted(output.key for job_id in jobs for output in get_job(database, job_id).outputs)
    assert len(expected) == len(jobs)
    wait_until(lambda: stored(s3) == expected, timeout_s=60)


@pytest.mark.timeout(180)
def test_each_job_is_encoded_once_and_generated_once_and_only_images_remain(
    installation: Installation, s3: Bucket
) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(installation.serving())
        database = stack.enter_context(installation.database())
        for number in range(2):
            stack.enter_context(serving_stage(installation, Stage.ENCODE, f"encoder-{number}"))
            stack.enter_context(serving_stage(installation, Stage.GENERATE, f"generator-{number}"))
        jobs = [submit(server) for _ in range(JOBS)]
        wait_until(lambda: all(get_job(database, job_id).status == "succeeded" for job_id in jobs), timeout_s=60)
        assert [timeline(database, job_id) for job_id in jobs] == [UNINTERRUPTED] * JOBS
        stages = serving(database)
        assert Counter(map(tuple, stages.values())) == {("encode",): 2, ("generate",): 2}
        for job_id in jobs:
            assert [stages[name] for name in workers_of(database, job_id)] == [["encode"], ["generate"]]
        wait_for_images_only(database, s3, jobs)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("stage", list(Stage))
def test_no_job_is_lost_when_a_worker_of_either_stage_is_killed(
    installation: Installation, s3: Bucket, stage: Stage
) -> None:
    hold = installation.folder / f"hold-{stage}"
    other = Stage.GENERATE if stage is Stage.ENCODE else Stage.ENCODE
    with ExitStack() as stack:
        server = stack.enter_context(installation.serving())
        database = stack.enter_context(installation.database())
        stack.enter_context(serving_stage(installation, other, "survivor"))
        hold.touch()
        with serving_stage(installation, stage, "victim") as victim:
            jobs = [submit(server) for _ in range(3)]

            def held() -> list[UUID]:
                rows = [get_job(database, job_id) for job_id in jobs]
                return [row.id for row in rows if (row.status, row.stage) == ("running", stage)]

            wait_until(held)
            victim.process.kill()
            victim.process.wait(10)
            lost = held()
        assert len(lost) == 1
        hold.unlink()
        stack.enter_context(serving_stage(installation, stage, "successor"))
        wait_until(lambda: all(get_job(database, job_id).status == "succeeded" for job_id in jobs), timeout_s=60)
        for job_id in jobs:
            types = timeline(database, job_id)
            if job_id in lost:
                at = types.index("rescued")
                assert types[at - 1 : at + 2] == ["claimed", "rescued", "claimed"]
                del types[at - 1 : at + 1]
            assert types == UNINTERRUPTED
        wait_for_images_only(database, s3, jobs)
