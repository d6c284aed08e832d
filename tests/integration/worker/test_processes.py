"""Real workers on the demo checkpoint: what starts, what a signal or a kill does, and what outages cost.

Loading torch takes seconds, so a worker lives through several tests: they stand in the order of its life.
"""

import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import make_url

from tests.integration.broker.cable import Cable, cable_to
from tests.integration.installation import TREE, Installation, events, told
from tests.integration.webhooks.receiver import receiving
from tests.services import process
from tests.services.postgres import Postgres
from tests.services.process import Running
from tests.services.redis import Redis
from tests.waiting import wait_until
from worker.app import BROKEN_STATUS
from zcore.broker import Doorbell, make_app
from zcore.errors import CheckpointError
from zcore.imaging.encode import read_parameters
from zcore.imaging.from_settings import load_pipeline
from zcore.jobs import lifecycle, presence, queries
from zcore.jobs.database import Database
from zcore.jobs.lifecycle import StoredOutput
from zcore.jobs.models import Job
from zcore.request import GenerationDefaults, RequestLimits, parse_submission
from zcore.stages import Stage

QUICK = {"width": 64, "height": 64, "steps": 2}
LONG = {"width": 256, "height": 256, "steps": 50, "n": 8}
START_S = 120


def submit(database: Database, url: str | None = None, **fields: object) -> UUID:
    """A queued job of which nobody is told."""
    body = {"prompt": "a red circle", **QUICK, **fields, "webhook_url": url}
    submission = parse_submission(body, GenerationDefaults(), RequestLimits())
    with database.write() as transaction:
        return lifecycle.submit(transaction, submission, "anna", "0" * 64, 3).job.id


def look(database: Database, job_id: UUID) -> Job:
    """The row as it stands."""
    with database.read() as transaction:
        return queries.get(transaction, job_id)


def timeline(database: Database, job_id: UUID) -> list[str]:
    """What happened to it."""
    with database.read() as transaction:
        return [event.type for event in queries.timeline(transaction, job_id).events]


def wait_for(database: Database, job_id: UUID, status: str) -> Job:
    """The job, once it is there."""
    wait_until(lambda: look(database, job_id).status == status, timeout_s=60, every_s=0.05)
    return look(database, job_id)


def wait_for_progress(database: Database, job_id: UUID, step: int) -> None:
    """Until the row tells of this step."""
    wait_until(lambda: look(database, job_id).progress_step >= step, timeout_s=60, every_s=0.02)


@dataclass(frozen=True)
class Wired:
    """A worker whose database and broker hang on cables; `database` and `doorbell` are the test's own way there."""

    running: Running
    database: Database
    doorbell: Doorbell
    to_database: Cable
    to_broker: Cable


@pytest.fixture(scope="module")
def wired(
    tmp_path_factory: pytest.TempPathFactory, postgres: Postgres, migrated_template: str, redis: Redis
) -> Iterator[Wired]:
    """It is started while its database is down."""
    redis.flush()
    port = make_url(redis.url).port
    assert port is not None
    assert postgres.url.port is not None
    with (
        postgres.database(migrated_template) as url,
        cable_to(postgres.url.port) as to_database,
        cable_to(port) as to_broker,
        closing(Database(url)) as database,
    ):
        to_database.cut()
        given = {
            "database.url": make_url(url).set(port=to_database.port).render_as_string(hide_password=False),
            "broker.url": f"redis://127.0.0.1:{to_broker.port}/0",
            "jobs.lease_s": 10.0,
            "worker.progress_interval_s": 0.05,
            "worker.upkeep_interval_s": 0.2,
        }
        installation = Installation(tmp_path_factory.mktemp("wired"), given)
        doorbell = Doorbell(make_app(installation.changed(broker__url=redis.url).settings))
        with installation.working() as running:
            yield Wired(running, database, doorbell, to_database, to_broker)
        doorbell.close()


def test_a_worker_started_before_its_database_waits_and_says_so(wired: Wired) -> None:
    wait_until(lambda: told(wired.running, "worker.waiting"), timeout_s=START_S)
    reason = next(line["reason"] for line in events(wired.running) if line["event"] == "worker.waiting")
    assert reason.startswith("the database does not answer")
    job_id = submit(wired.database)
    wired.to_database.plug()
    wait_until(lambda: told(wired.running, "worker.ready"), timeout_s=START_S)
    wait_for(wired.database, job_id, "succeeded")
    with wired.database.read() as transaction:
        assert [worker.device for worker in presence.present(transaction)] == ["cpu"]


def test_a_ring_wakes_the_worker_and_the_picture_is_the_requests(wired: Wired) -> None:
    job_id = submit(wired.database, seed=42, n=2)
    wired.doorbell.announce(Stage.GENERATE)
    job = wait_for(wired.database, job_id, "succeeded")
    storage = wired.running.log.parent / "storage"
    for output in job.outputs:
        parameters = read_parameters((storage / output.key).read_bytes())
        assert parameters is not None
        assert (parameters.request.prompt, parameters.request.seed) == ("a red circle", 42 + output.position)
    assert job.engine["model"] == "checkpoint"


def test_a_picture_is_painted_from_the_one_before(wired: Wired) -> None:
    first = submit(wired.database)
    wired.doorbell.announce(Stage.GENERATE)
    (start,) = wait_for(wired.database, first, "succeeded").outputs
    second = submit(wired.database, image=f"output:{first}/0", strength=0.5)
    wired.doorbell.announce(Stage.GENERATE)
    (output,) = wait_for(wired.database, second, "succeeded").outputs
    parameters = read_parameters((wired.running.log.parent / "storage" / output.key).read_bytes())
    assert parameters is not None
    assert parameters.inputs == {"image": start.sha256}


def test_progress_is_seen_and_a_cancel_frees_the_worker(wired: Wired) -> None:
    job_id = submit(wired.database, **LONG)
    wired.doorbell.announce(Stage.GENERATE)
    wait_for_progress(wired.database, job_id, 2)
    running = look(wired.database, job_id)
    assert (running.status, running.progress_phase, running.progress_steps) == ("running", "denoise", 400)
    with wired.database.write() as transaction:
        lifecycle.cancel(transaction, job_id)
    job = wait_for(wired.database, job_id, "canceled")
    assert job.progress_step < 200
    after = submit(wired.database)
    wired.doorbell.announce(Stage.GENERATE)
    wait_for(wired.database, after, "succeeded")


def test_an_outage_of_the_database_shorter_than_the_lease_costs_no_attempt(wired: Wired) -> None:
    job_id = submit(wired.database, **{**LONG, "n": 1})
    wired.doorbell.announce(Stage.GENERATE)
    wait_for_progress(wired.database, job_id, 1)
    wired.to_database.cut()
    wait_until(lambda: told(wired.running, "job.heartbeat_failed"))
    wired.to_database.plug()
    assert wait_for(wired.database, job_id, "succeeded").attempt == 1


def test_a_broker_that_goes_and_comes_back_empty_loses_no_job(wired: Wired, redis: Redis) -> None:
    wired.to_broker.cut()
    jobs = [submit(wired.database) for _ in range(3)]
    wired.doorbell.announce(Stage.GENERATE)
    redis.flush()
    wired.to_broker.plug()
    for job_id in jobs:
        wait_for(wired.database, job_id, "succeeded")


def test_asked_to_leave_it_finishes_the_job_in_hand(wired: Wired) -> None:
    in_hand, waiting = submit(wired.database, **{**LONG, "n": 1}), submit(wired.database)
    wired.doorbell.announce(Stage.GENERATE)
    wait_for_progress(wired.database, in_hand, 1)
    wired.running.send(signal.SIGTERM)
    assert wired.running.process.wait(60) == 0
    assert look(wired.database, in_hand).status == "succeeded"
    assert timeline(wired.database, in_hand) == ["queued", "claimed", "succeeded"]
    assert look(wired.database, waiting).status == "queued"
    with wired.database.read() as transaction:
        assert presence.present(transaction) == []
    assert events(wired.running)[-1]["event"] == "worker.ended"


def test_a_worker_killed_in_mid_job_is_survived_and_one_without_time_hands_back(
    tmp_path: Path, migrated_file: Path
) -> None:
    """On the embedded parts: SQLite, a folder for a broker, a folder for pictures."""
    shutil.copy(migrated_file, tmp_path / "zimage.db")
    given = {
        "jobs.lease_s": 2.0,
        "worker.progress_interval_s": 0.05,
        "worker.upkeep_interval_s": 0.2,
        "worker.shutdown_grace_s": 0,
    }
    installation = Installation(tmp_path, given)
    with (
        installation.database() as database,
        closing(Doorbell(make_app(installation.settings))) as doorbell,
        installation.working(name="first") as first,
    ):
        wait_until(lambda: told(first, "worker.ready"), timeout_s=START_S)
        killed_in = submit(database, **{**LONG, "n": 1})
        doorbell.announce(Stage.GENERATE)
        wait_for_progress(database, killed_in, 1)
        first.send(signal.SIGKILL)
        first.process.wait(10)
        assert look(database, killed_in).status == "running"

        with installation.working(name="second") as second:
            wait_until(lambda: told(second, "worker.ready"), timeout_s=START_S)
            job = wait_for(database, killed_in, "succeeded")
            assert job.attempt == 2
            assert timeline(database, killed_in) == ["queued", "claimed", "rescued", "claimed", "succeeded"]
            assert [output.key for output in job.outputs] == [f"jobs/{killed_in}/2-0.png"]

            left_in = submit(database, **LONG)
            doorbell.announce(Stage.GENERATE)
            wait_for_progress(database, left_in, 1)
            second.send(signal.SIGTERM)
            assert second.process.wait(30) == 0
            handed_back = look(database, left_in)
            assert (handed_back.status, handed_back.attempts_left) == ("queued", 3)
            assert timeline(database, left_in) == ["queued", "claimed", "handed_back"]


def test_what_cannot_work_is_refused_in_one_line(tmp_path: Path, migrated_file: Path) -> None:
    refusals = {
        "pytorch.tile_overlap=512": "worker: tile_overlap: 512 px is more than half of tile_size, 512 px",
        'worker.stages=["generate"]': "worker: worker.stages: only `generate`, but jobs.split_encoding is off",
        "nonsense": "worker: `nonsense`: settings are given as name=value",
    }
    shutil.copy(migrated_file, tmp_path / "zimage.db")
    installation = Installation(tmp_path, {})
    started = [
        (installation.start("worker", f"refused-{index}", argument), line)
        for index, (argument, line) in enumerate(refusals.items())
    ]
    for running, line in started:
        assert running.process.wait(START_S) == 2, running.last_lines()
        assert running.last_lines().startswith(line)
        assert "\n" not in running.last_lines()


def test_a_worker_whose_gpu_has_failed_gives_its_job_back_and_ends_with_a_status_of_its_own(
    tmp_path: Path, migrated_file: Path
) -> None:
    shutil.copy(migrated_file, tmp_path / "zimage.db")
    installation = Installation(tmp_path, {})
    with installation.database() as database:
        job_id = submit(database)
        command = [sys.executable, "-m", "tests.integration.worker.broken_gpu"]
        running = process.start(command, tmp_path / "broken.log", environment=installation.environment, folder=TREE)
        assert running.process.wait(START_S) == BROKEN_STATUS, running.last_lines()
        assert timeline(database, job_id) == ["queued", "claimed", "postponed"]


def test_a_model_that_is_not_there_is_named_with_its_setting(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="model_path: no/such/folder is not a folder"):
        load_pipeline(Installation(tmp_path, {"model_path": "no/such/folder"}).settings)


def test_upkeep_alone_rescues_expires_and_delivers(tmp_path: Path, migrated_file: Path) -> None:
    shutil.copy(migrated_file, tmp_path / "zimage.db")
    installation = Installation(tmp_path, {"worker.upkeep_interval_s": 0.1})
    with (
        receiving() as receiver,
        installation.database() as database,
        installation.working("worker.upkeep") as running,
    ):
        wait_until(lambda: told(running, "upkeep.ready"), timeout_s=START_S)
        lost = submit(database, receiver.url)
        with database.write() as transaction:
            lifecycle.claim(transaction, "a worker that died", lease_s=0.2)
        wait_for(database, lost, "queued")

        picture = tmp_path / "storage" / "jobs" / str(lost) / "2-0.png"
        picture.parent.mkdir(parents=True)
        picture.write_bytes(b"\x89PNG")
        with database.write() as transaction:
            claimed = lifecycle.claim(transaction, "a worker", lease_s=60)
            assert claimed is not None
            stored = StoredOutput(0, f"jobs/{lost}/2-0.png", "png", 64, 64, 4, "a" * 64, 42)
            lifecycle.complete(transaction, lifecycle.lease_of(claimed), [stored], {}, {}, retention_s=3600)
        wait_until(lambda: receiver.told)
        assert receiver.told[0].document["type"] == "job.succeeded"

        with database.write() as transaction:
            queries.get(transaction, lost).expires_at -= timedelta(hours=2)  # type: ignore[operator]
        wait_for(database, lost, "expired")
        assert not picture.exists()
        running.send(signal.SIGTERM)
        assert running.process.wait(30) == 0
