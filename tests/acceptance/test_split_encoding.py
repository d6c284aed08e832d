"""Prompts encoded by processes without a GPU and pictures painted by others, PostgreSQL, Redis and a bucket between
them; also when either kind is killed. The models are stand-ins: only the way between the processes is looked at.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import UUID

import httpx
import pytest

from tests.acceptance.installation import distributed
from tests.integration.installation import Installation, Server, told
from tests.services.process import Running
from tests.services.s3 import Bucket
from tests.waiting import wait_until
from zcore.jobs import presence, queries
from zcore.jobs.database import Database
from zcore.jobs.models import Job
from zcore.stages import Stage

pytestmark = pytest.mark.acceptance

JOBS = 12
STRAIGHT = ["queued", "claimed", "encoded", "claimed", "succeeded"]


@pytest.fixture
def installation(tmp_path: Path, database_url: str, redis_url: str, s3: Bucket) -> Installation:
    """One whose prompts are encoded by other workers; a lost one is missed soon."""
    settings = {
        "jobs.split_encoding": True,
        "jobs.lease_s": 2.0,
        "worker.upkeep_interval_s": 0.2,
        "worker.progress_interval_s": 0.05,
    }
    return distributed(tmp_path, database_url, redis_url, s3, settings)


@contextmanager
def serving_stage(installation: Installation, stage: Stage, name: str) -> Iterator[Running]:
    """A worker of this stage alone, once it is ready."""
    given = installation.changed(worker__stages=[stage])
    with given.working("tests.integration.worker.stand_ins", name) as running:
        wait_until(lambda: told(running, "worker.ready"), timeout_s=60)
        yield running


def submit(server: Server) -> UUID:
    answer = httpx.post(f"{server.url}/api/generate", json={"prompt": "a heron", "width": 64, "height": 64, "steps": 4})
    assert answer.status_code == 202
    assert answer.json()["stage"] == "encode"
    return UUID(answer.json()["id"])


def look(database: Database, job_id: UUID) -> Job:
    with database.read() as transaction:
        return queries.get(transaction, job_id)


def timeline(database: Database, job_id: UUID) -> list[str]:
    with database.read() as transaction:
        return [event.type for event in queries.timeline(transaction, job_id).events]


def workers_of(database: Database, job_id: UUID) -> list[str]:
    """Who claimed it, in turn."""
    with database.read() as transaction:
        told_of = queries.timeline(transaction, job_id).events
    return [event.detail["worker"] for event in told_of if event.type == "claimed"]


def serving(database: Database) -> dict[str, list[str]]:
    """The stages of the workers that are present, by name."""
    with database.read() as transaction:
        return {worker.name: worker.stages for worker in presence.present(transaction)}


def stored(s3: Bucket) -> list[str]:
    with s3.client() as client:
        return sorted(found["Key"] for found in client.list_objects_v2(Bucket=s3.name).get("Contents", []))


def wait_for_pictures_alone(database: Database, s3: Bucket, jobs: list[UUID]) -> None:
    """Until the bucket holds each job's picture and nothing else."""
    expected = sorted(output.key for job_id in jobs for output in look(database, job_id).outputs)
    assert len(expected) == len(jobs)
    wait_until(lambda: stored(s3) == expected, timeout_s=15)


@pytest.mark.timeout(180)
def test_each_job_is_encoded_once_and_painted_once_and_only_pictures_stay(
    installation: Installation, s3: Bucket
) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(installation.serving())
        database = stack.enter_context(installation.database())
        for number in range(2):
            stack.enter_context(serving_stage(installation, Stage.ENCODE, f"encoder-{number}"))
            stack.enter_context(serving_stage(installation, Stage.GENERATE, f"generator-{number}"))
        jobs = [submit(server) for _ in range(JOBS)]
        wait_until(lambda: all(look(database, job_id).status == "succeeded" for job_id in jobs), timeout_s=60)
        assert [timeline(database, job_id) for job_id in jobs] == [STRAIGHT] * JOBS
        stages = serving(database)
        assert Counter(map(tuple, stages.values())) == {("encode",): 2, ("generate",): 2}
        for job_id in jobs:
            assert [stages[name] for name in workers_of(database, job_id)] == [["encode"], ["generate"]]
        wait_for_pictures_alone(database, s3, jobs)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("stage", list(Stage))
def test_a_worker_of_either_kind_that_is_killed_loses_nothing(
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
                rows = [look(database, job_id) for job_id in jobs]
                return [row.id for row in rows if (row.status, row.stage) == ("running", stage)]

            wait_until(held)
            victim.process.kill()
            victim.process.wait(10)
            lost = held()
        assert len(lost) == 1
        hold.unlink()
        stack.enter_context(serving_stage(installation, stage, "successor"))
        wait_until(lambda: all(look(database, job_id).status == "succeeded" for job_id in jobs), timeout_s=60)
        for job_id in jobs:
            story = timeline(database, job_id)
            if job_id in lost:
                at = story.index("rescued")
                assert story[at - 1 : at + 2] == ["claimed", "rescued", "claimed"]
                del story[at - 1 : at + 1]
            assert story == STRAIGHT
        wait_for_pictures_alone(database, s3, jobs)
