"""Worker processes on the demo checkpoint: start, signals, kills and outages.

Loading torch takes seconds, so several tests share one worker and depend on their order.
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

from tests.integration.broker.tcp_proxy import TcpProxy, proxy_to
from tests.integration.installation import TREE, Installation, events, has_logged
from tests.integration.webhooks.receiver import receiving
from tests.services import process
from tests.services.postgres import Postgres
from tests.services.process import Running
from tests.services.redis import Redis
from tests.waiting import wait_until
from worker.app import BROKEN_STATUS
from zcore.broker import Notifier, make_app
from zcore.errors import CheckpointError
from zcore.image_files.writing import read_parameters
from zcore.imaging.from_settings import load_pipeline
from zcore.jobs import claims, lifecycle, queries, workers
from zcore.jobs.database import Database
from zcore.jobs.lifecycle import StoredOutput
from zcore.jobs.models import Job
from zcore.request import GenerationDefaults, RequestLimits, parse_submission
from zcore.stages import Stage

QUICK = {"width": 64, "height": 64, "steps": 2}
LONG = {"width": 256, "height": 256, "steps": 50, "n": 8}
START_S = 120


def submit(database: Database, url: str | None = None, **fields: object) -> UUID:
    """Submit a job without a notification, and return its id."""
    body = {"prompt": "a red circle", **QUICK, **fields, "webhook_url": url}
    submission = parse_submission(body, GenerationDefaults(), RequestLimits())
    with database.write() as transaction:
        return lifecycle.submit(transaction, submission, "anna", "0" * 64, 3).job.id


def get_job(database: Database, job_id: UUID) -> Job:
    """Return the current row of a job."""
    with database.read() as transaction:
        return queries.get(transaction, job_id)


def timeline(database: Database, job_id: UUID) -> list[str]:
    """Return the types of a job's events, oldest first."""
    with database.read() as transaction:
        return [event.type for event in queries.timeline(transaction, job_id).events]


def wait_for(database: Database, job_id: UUID, status: str) -> Job:
    """Wait until the job has this status, and return it."""
    wait_until(lambda: get_job(database, job_id).status == status, timeout_s=60, every_s=0.05)
    return get_job(database, job_id)


def wait_for_progress(database: Database, job_id: UUID, step: int) -> None:
    """Wait until the row shows this step."""
    wait_until(lambda: get_job(database, job_id).progress_step >= step, timeout_s=60, every_s=0.02)


@dataclass(frozen=True)
class WiredWorker:
    """A worker that reaches its database and broker over cables; `database` and `notifier` connect directly."""

    running: Running
    database: Database
    notifier: Notifier
    database_cable: TcpProxy
    broker_cable: TcpProxy


@pytest.fixture(scope="module")
def wired(
    tmp_path_factory: pytest.TempPathFactory, postgres: Postgres, migrated_template: str, redis: Redis
) -> Iterator[WiredWorker]:
    """A worker that is started while its database is down."""
    redis.flush()
    port = make_url(redis.url).port
    assert port is not None
    assert postgres.url.port is not None
    with (
        postgres.database(migrated_template) as url,
        proxy_to(postgres.url.port) as database_cable,
        proxy_to(port) as broker_cable,
        closing(Database(url)) as database,
    ):
        database_cable.cut()
        settings = {
            "database.url": make_url(url).set(port=database_cable.port).render_as_string(hide_password=False),
            "broker.url": f"redis://127.0.0.1:{broker_cable.port}/0",
            "jobs.lease_s": 10.0,
            "worker.shutdown_grace_s": 120.0,  # a loaded machine takes a while for the current job
            "worker.progress_interval_s": 0.05,
            "worker.maintenance_interval_s": 0.2,
        }
        installation = Installation(tmp_path_factory.mktemp("wired"), settings)
        notifier = Notifier(make_app(installation.changed(broker__url=redis.url).settings))
        with installation.working() as running:
            yield WiredWorker(running, database, notifier, database_cable, broker_cable)
        notifier.close()


def test_a_worker_started_before_its_database_waits_and_logs_the_reason(wired: WiredWorker) -> None:
    wait_until(lambda: has_logged(wired.running, "worker.start_delayed"), timeout_s=START_S)
    reason = next(line["reason"] for line in events(wired.running) if line["event"] == "worker.start_delayed")
    assert reason.startswith("the database does not answer")
    job_id = submit(wired.database)
    wired.database_cable.plug()
    wait_until(lambda: has_logged(wired.running, "worker.started"), timeout_s=START_S)
    wait_for(wired.database, job_id, "succeeded")
    with wired.database.read() as transaction:
        assert [worker.device for worker in workers.present(transaction)] == ["cpu"]


def test_a_notification_starts_the_worker_and_the_images_match_the_request(wired: WiredWorker) -> None:
    job_id = submit(wired.database, seed=42, n=2)
    wired.notifier.notify(Stage.GENERATE)
    job = wait_for(wired.database, job_id, "succeeded")
    storage = wired.running.log.parent / "storage"
    for output in job.outputs:
        parameters = read_parameters((storage / output.key).read_bytes())
        assert parameters is not None
        assert (parameters.request.prompt, parameters.request.seed) == ("a red circle", 42 + output.position)
    assert job.engine["model"] == "checkpoint"


def test_an_image_is_generated_from_an_earlier_output(wired: WiredWorker) -> None:
    first = submit(wired.database)
    wired.notifier.notify(Stage.GENERATE)
    (earlier,) = wait_for(wired.database, first, "succeeded").outputs
    second = submit(wired.database, image=f"output:{first}/0", strength=0.5)
    wired.notifier.notify(Stage.GENERATE)
    (output,) = wait_for(wired.database, second, "succeeded").outputs
    parameters = read_parameters((wired.running.log.parent / "storage" / output.key).read_bytes())
    assert parameters is not None
    assert parameters.inputs == {"image": earlier.sha256}


def test_progress_is_written_and_a_cancellation_frees_the_worker(wired: WiredWorker) -> None:
    job_id = submit(wired.database, **LONG)
    wired.notifier.notify(Stage.GENERATE)
    wait_for_progress(wired.database, job_id, 2)
    running = get_job(wired.database, job_id)
    assert (running.status, running.progress_phase, running.progress_steps) == ("running", "denoise", 400)
    with wired.database.write() as transaction:
        lifecycle.cancel(transaction, job_id)
    job = wait_for(wired.database, job_id, "canceled")
    assert job.progress_step < 200
    after = submit(wired.database)
    wired.notifier.notify(Stage.GENERATE)
    wait_for(wired.database, after, "succeeded")


def test_an_outage_of_the_database_shorter_than_the_lease_costs_no_attempt(wired: WiredWorker) -> None:
    job_id = submit(wired.database, **{**LONG, "n": 1})
    wired.notifier.notify(Stage.GENERATE)
    wait_for_progress(wired.database, job_id, 1)
    wired.database_cable.cut()
    wait_until(lambda: has_logged(wired.running, "job.heartbeat_failed"))
    wired.database_cable.plug()
    assert wait_for(wired.database, job_id, "succeeded").attempt == 1


def test_an_outage_of_the_broker_that_loses_its_data_loses_no_job(wired: WiredWorker, redis: Redis) -> None:
    wired.broker_cable.cut()
    jobs = [submit(wired.database) for _ in range(3)]
    wired.notifier.notify(Stage.GENERATE)
    redis.flush()
    wired.broker_cable.plug()
    for job_id in jobs:
        wait_for(wired.database, job_id, "succeeded")


def test_a_worker_finishes_its_current_job_on_sigterm(wired: WiredWorker) -> None:
    current, waiting = submit(wired.database, **{**LONG, "n": 1}), submit(wired.database)
    wired.notifier.notify(Stage.GENERATE)
    wait_for_progress(wired.database, current, 1)
    wired.running.send(signal.SIGTERM)
    assert wired.running.process.wait(120) == 0
    assert get_job(wired.database, current).status == "succeeded"
    assert timeline(wired.database, current) == ["queued", "claimed", "succeeded"]
    assert get_job(wired.database, waiting).status == "queued"
    with wired.database.read() as transaction:
        assert workers.present(transaction) == []
    assert events(wired.running)[-1]["event"] == "worker.stopped"


def test_a_job_survives_a_killed_worker_and_is_handed_back_by_one_without_grace_time(
    tmp_path: Path, migrated_file: Path
) -> None:
    """The installation is embedded: SQLite, and folders for the broker and the storage."""
    shutil.copy(migrated_file, tmp_path / "zimage.db")
    settings = {
        "jobs.lease_s": 2.0,
        "worker.progress_interval_s": 0.05,
        "worker.maintenance_interval_s": 0.2,
        "worker.shutdown_grace_s": 0,
    }
    installation = Installation(tmp_path, settings)
    with (
        installation.database() as database,
        closing(Notifier(make_app(installation.settings))) as notifier,
        installation.working(name="first") as first,
    ):
        wait_until(lambda: has_logged(first, "worker.started"), timeout_s=START_S)
        interrupted = submit(database, **{**LONG, "n": 1})
        notifier.notify(Stage.GENERATE)
        wait_for_progress(database, interrupted, 1)
        first.send(signal.SIGKILL)
        first.process.wait(10)
        assert get_job(database, interrupted).status == "running"

        with installation.working(name="second") as second:
            wait_until(lambda: has_logged(second, "worker.started"), timeout_s=START_S)
            job = wait_for(database, interrupted, "succeeded")
            assert job.attempt == 2
            assert timeline(database, interrupted) == ["queued", "claimed", "rescued", "claimed", "succeeded"]
            assert [output.key for output in job.outputs] == [f"jobs/{interrupted}/2-0.png"]

            handed_back_id = submit(database, **LONG)
            notifier.notify(Stage.GENERATE)
            wait_for_progress(database, handed_back_id, 1)
            second.send(signal.SIGTERM)
            assert second.process.wait(30) == 0
            handed_back = get_job(database, handed_back_id)
            assert (handed_back.status, handed_back.attempts_left) == ("queued", 3)
            assert timeline(database, handed_back_id) == ["queued", "claimed", "released"]


def test_a_worker_that_cannot_start_exits_with_one_line(tmp_path: Path, migrated_file: Path) -> None:
    messages = {
        "pytorch.tile_overlap=512": "worker: tile_overlap: ",
        'worker.stages=["generate"]': "worker: worker.stages: contains only `generate`, but jobs.split_encoding is off",
        "nonsense": "worker: `nonsense`: ",
    }
    shutil.copyfile(migrated_file, tmp_path / "zimage.db")
    (tmp_path / "zimage.db").chmod(0o600)  # wider rights would be taken away, with a line in the log
    installation = Installation(tmp_path, {})
    started = [
        (installation.start("worker", f"refused-{index}", argument), line)
        for index, (argument, line) in enumerate(messages.items())
    ]
    for running, line in started:
        assert running.process.wait(START_S) == 2, running.last_lines()
        *events, last = running.last_lines().splitlines()
        assert last.startswith(line)
        assert all(event.startswith("{") for event in events)  # the log, and no traceback


def test_a_worker_whose_gpu_has_failed_postpones_its_job_and_exits_with_its_own_status(
    tmp_path: Path, migrated_file: Path
) -> None:
    shutil.copy(migrated_file, tmp_path / "zimage.db")
    installation = Installation(tmp_path, {})
    with installation.database() as database:
        job_id = submit(database)
        command = [sys.executable, "-m", "tests.integration.worker.broken_gpu"]
        running = process.start(command, tmp_path / "broken.log", environment=installation.environment, folder=TREE)
        assert running.process.wait(START_S) == BROKEN_STATUS, running.last_lines()
        assert timeline(database, job_id) == ["queued", "claimed", "retry_scheduled"]


def test_a_missing_model_is_reported_with_its_setting(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model_path: .*no/such/folder"):
        load_pipeline(Installation(tmp_path, {"model_path": "no/such/folder"}).settings)


def test_maintenance_alone_rescues_expires_and_delivers(tmp_path: Path, migrated_file: Path) -> None:
    shutil.copy(migrated_file, tmp_path / "zimage.db")
    installation = Installation(tmp_path, {"worker.maintenance_interval_s": 0.1})
    with (
        receiving() as receiver,
        installation.database() as database,
        installation.working("maintenance") as running,
    ):
        wait_until(lambda: has_logged(running, "maintenance.started"), timeout_s=START_S)
        lost = submit(database, receiver.url)
        with database.write() as transaction:
            claims.claim(transaction, "a dead worker", lease_s=0.2)
        wait_for(database, lost, "queued")

        image = tmp_path / "storage" / "jobs" / str(lost) / "2-0.png"
        image.parent.mkdir(parents=True)
        image.write_bytes(b"\x89PNG")
        with database.write() as transaction:
            claimed = claims.claim(transaction, "a worker", lease_s=60)
            assert claimed is not None
            stored = StoredOutput(0, f"jobs/{lost}/2-0.png", "png", 64, 64, 4, "a" * 64, 42)
            lifecycle.complete(transaction, claims.lease_of(claimed), [stored], {}, {}, retention_s=3600)
        wait_until(lambda: receiver.requests)
        assert receiver.requests[0].document["type"] == "job.succeeded"

        with database.write() as transaction:
            queries.get(transaction, lost).expires_at -= timedelta(hours=2)
        wait_for(database, lost, "expired")
        assert not image.exists()
        running.send(signal.SIGTERM)
        assert running.process.wait(30) == 0
