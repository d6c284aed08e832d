"""Maintenance: lost jobs are rescued, expired data is deleted, and no error stops it."""

import contextlib
import dataclasses
import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from tests.integration.worker.conftest import Environment
from tests.integration.worker.stand_in_pipeline import Notifications
from tests.waiting import wait_until
from worker.maintenance import tasks
from worker.maintenance.leadership import WORK
from worker.maintenance.scheduler import Maintenance
from worker.shutdown import Shutdown
from zcore.errors import StorageError
from zcore.jobs import agenda, claims, lifecycle, queries, recovery, uploads, workers
from zcore.jobs.database import Database
from zcore.jobs.models import Input, Job, Worker
from zcore.jobs.uploads import UploadedImage
from zcore.settings import JobsSettings, WorkerSettings
from zcore.stages import Stage


@pytest.fixture
def notifications(environment: Environment) -> Notifications:
    """The notifications that maintenance sends."""
    return environment.notifications


def claim_without_heartbeat(environment: Environment, lease_s: float) -> claims.Lease:
    """Claim the next job for a worker that then stops without a trace."""
    with environment.database.write() as transaction:
        job = claims.claim(transaction, "worker-9", lease_s)
    assert job is not None
    return claims.lease_of(job)


def test_a_job_of_a_dead_worker_returns_to_the_queue_and_a_worker_is_notified(
    environment: Environment, maintenance: Maintenance, notifications: Notifications
) -> None:
    job_id = environment.submit()
    claim_without_heartbeat(environment, lease_s=-1)
    environment.report_present("worker-1")
    maintenance.run_once()
    assert environment.job(job_id).status == "queued"
    assert notifications.count == 1
    assert not environment.ended.is_set()


def test_a_job_with_a_valid_lease_is_left_alone(
    environment: Environment, maintenance: Maintenance, notifications: Notifications
) -> None:
    job_id = environment.submit()
    claim_without_heartbeat(environment, lease_s=60)
    maintenance.run_once()
    assert (environment.job(job_id).status, notifications.count) == ("running", 0)


@pytest.mark.parametrize("file_format", ["png", "avif"])
def test_a_job_whose_worker_dies_whenever_it_runs_alone_fails_and_its_images_are_deleted(
    environment: Environment, maintenance: Maintenance, file_format: str
) -> None:
    job_id = environment.submit(max_attempts=1, n=2, format=file_format)
    claim_without_heartbeat(environment, lease_s=-1)
    maintenance.run_once()
    assert not environment.ended.is_set()
    claim_without_heartbeat(environment, lease_s=-1)
    environment.storage.put(f"jobs/{job_id}/2-1.{file_format}", b"stored before the kill", f"image/{file_format}")
    maintenance.run_once()
    assert (environment.job(job_id).status, environment.job(job_id).error_code) == ("failed", "poison")
    assert environment.ended.is_set()
    assert len(environment.storage.keys()) == 1, "its worker may still be storing"
    environment.delete_leftovers()
    assert environment.storage.keys() == []


def test_images_of_a_row_without_a_format_are_deleted_as_png(environment: Environment) -> None:
    job_id = environment.submit(max_attempts=1)
    with environment.database.write() as transaction:
        job = queries.get(transaction, job_id)
        job.request = {name: value for name, value in job.request.items() if name != "format"}
    lease = claim_without_heartbeat(environment, lease_s=60)
    environment.storage.put(f"jobs/{job_id}/1-0.png", b"stored by an earlier version", "image/png")
    environment.cancel(job_id)
    with environment.database.write() as transaction:
        lifecycle.acknowledge_cancel(transaction, lease)
    environment.delete_leftovers()
    assert environment.storage.keys() == []


def let_notifications_age(environment: Environment, seconds: float) -> None:
    """Let the last notification of every job be `seconds` older."""
    with environment.database.write() as transaction:
        for job in queries.page(transaction, queries.JobFilter(), None, 50).jobs:
            assert job.entry is not None
            assert job.entry.notified_at is not None
            job.entry.notified_at -= timedelta(seconds=seconds)


def test_a_lost_notification_is_repeated_within_two_seconds(
    environment: Environment, maintenance: Maintenance, notifications: Notifications
) -> None:
    environment.report_present("worker-1")
    environment.submit()
    maintenance.run_once()
    assert notifications.count == 0, "its submission has sent a notification"
    let_notifications_age(environment, seconds=2 - WorkerSettings().maintenance_interval_s)
    maintenance.run_once()
    maintenance.run_once()
    assert notifications.count == 1


def test_each_idle_worker_is_notified_once_and_busy_workers_are_not(
    environment: Environment, maintenance: Maintenance, notifications: Notifications
) -> None:
    for _ in range(10):
        environment.submit()
    claim_without_heartbeat(environment, lease_s=60)  # by worker-9
    environment.report_present("worker-9")
    let_notifications_age(environment, seconds=6)
    maintenance.run_once()
    assert notifications.count == 0, "a busy worker claims the next job without a notification"
    environment.report_present("worker-1", "worker-2")
    maintenance.run_once()
    assert notifications.count == 2


def test_no_notification_is_sent_where_nobody_would_read_it(
    environment: Environment, maintenance: Maintenance, notifications: Notifications
) -> None:
    environment.submit()
    let_notifications_age(environment, seconds=600)
    environment.report_present("cpu-1", stages=[Stage.ENCODE])
    maintenance.run_once()
    assert notifications.stages == [], "no worker serves the stage; one that starts looks for jobs by itself"
    environment.report_present("gpu-1", stages=[Stage.GENERATE])
    maintenance.run_once()
    assert notifications.stages == [Stage.GENERATE]


def test_notifications_are_sent_to_the_stage_where_jobs_wait(
    environment: Environment, maintenance: Maintenance, notifications: Notifications
) -> None:
    for stage in (Stage.ENCODE, Stage.ENCODE, Stage.ENCODE, Stage.GENERATE, Stage.GENERATE):
        environment.submit(stage=stage)
    environment.report_present("cpu-1", "cpu-2", stages=[Stage.ENCODE])
    environment.report_present("gpu-1", stages=[Stage.GENERATE])
    let_notifications_age(environment, seconds=6)
    maintenance.run_once()
    assert notifications.stages == [Stage.ENCODE, Stage.ENCODE, Stage.GENERATE]


def test_images_past_their_retention_are_deleted_and_their_job_expires(
    environment: Environment, maintenance: Maintenance
) -> None:
    recent, past = environment.submit(n=2), environment.submit(n=2)
    environment.generate_due()
    with environment.database.write() as transaction:
        queries.get(transaction, past).expires_at = transaction.now
    maintenance.run_once()
    assert (environment.job(recent).status, environment.job(past).status) == ("succeeded", "expired")
    assert environment.storage.keys() == [f"jobs/{recent}/1-{index}.png" for index in range(2)]
    assert len(environment.job(past).outputs) == 2, "the outputs stay in the database"


def test_images_are_deleted_after_a_storage_outage(
    environment: Environment, maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    past = environment.submit()
    environment.generate_due()
    with environment.database.write() as transaction:
        queries.get(transaction, past).expires_at = transaction.now

    def refuse(_keys: object) -> None:
        raise StorageError("the storage is down")

    with monkeypatch.context() as patched:
        patched.setattr(environment.storage, "delete", refuse)
        maintenance.run_once()
        assert (environment.job(past).status, len(environment.storage.keys())) == ("expired", 1)
    environment.delete_leftovers()
    assert environment.storage.keys() == []


def test_a_crash_of_one_task_stops_neither_the_others_nor_the_next_run(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutdown = Shutdown(0)
    maintenance = environment.maintenance(shutdown)

    def crash(_transaction: object) -> None:
        raise ValueError

    past = environment.submit()
    environment.generate_due()
    with environment.database.write() as transaction:
        queries.get(transaction, past).expires_at = transaction.now
    monkeypatch.setattr(recovery, "rescue", crash)
    maintenance.start()
    wait_until(lambda: environment.job(past).status == "expired")
    monkeypatch.undo()
    job_id = environment.submit()
    claim_without_heartbeat(environment, lease_s=-1)
    wait_until(lambda: environment.job(job_id).status == "queued")
    shutdown.begin()
    maintenance.stop()


def test_workers_that_were_not_seen_for_a_day_are_deleted(environment: Environment, maintenance: Maintenance) -> None:
    with environment.database.write() as transaction:
        for name in ("present", "lost"):
            workers.report(transaction, name, "demo", "cpu")
        transaction.session.flush()
        lost = transaction.session.get(Worker, "lost")
        assert lost is not None
        lost.seen_at -= timedelta(days=2)
    maintenance.run_once()
    with environment.database.read() as transaction:
        assert [worker.name for worker in transaction.session.query(Worker)] == ["present"]


def upload(environment: Environment, name: str, owner: str = "anna") -> str:
    """Store an upload with a retention of one minute, and return its key."""
    sha256 = hashlib.sha256(name.encode()).hexdigest()
    with environment.database.write() as transaction:
        recorded = uploads.record(transaction, owner, UploadedImage(sha256, "png", 64, 64, 3))
    environment.storage.put(recorded.storage_key, b"png", "image/png")
    with environment.database.write() as transaction:
        uploads.mark_stored(transaction, recorded, retention_s=60)
    return recorded.storage_key


def address(key: str) -> str:
    """Return the address of an upload in a request."""
    return f"input:{key.rpartition('/')[2].partition('-')[0]}"


def let_uploads_expire(environment: Environment) -> None:
    """Let every upload expire two minutes ago."""
    with environment.database.write() as transaction:
        for row in transaction.session.query(Input):
            row.expires_at = transaction.now - timedelta(minutes=2)


def test_uploads_past_their_retention_are_deleted(environment: Environment, maintenance: Maintenance) -> None:
    for name in ("past", "also past"):
        upload(environment, name)
    let_uploads_expire(environment)
    recent = upload(environment, "recent")
    maintenance.run_once()
    assert environment.storage.keys() == [recent]
    with environment.database.read() as transaction:
        assert [row.storage_key for row in transaction.session.query(Input)] == [recent]


def test_an_upload_is_deleted_a_minute_after_its_retention(environment: Environment, maintenance: Maintenance) -> None:
    key = upload(environment, "just past")
    with environment.database.write() as transaction:
        transaction.session.query(Input).one().expires_at = transaction.now - timedelta(seconds=30)
    maintenance.run_once()
    assert environment.storage.keys() == [key], "a submission that uses it may not be committed yet"


def test_an_upload_that_a_job_needs_is_deleted_after_the_job_has_ended(
    environment: Environment, maintenance: Maintenance
) -> None:
    image, mask = upload(environment, "image"), upload(environment, "mask")
    unused = upload(environment, "image", owner="ben")
    running = environment.submit(image=address(image))
    lease = claim_without_heartbeat(environment, lease_s=60)
    queued = environment.submit(image=address(image), mask=address(mask))
    environment.submit(image="https://images.example/cat.png")
    let_uploads_expire(environment)
    maintenance.run_once()
    assert environment.storage.keys() == sorted([image, mask]), f"no job needs {unused}"
    environment.cancel(queued)
    let_uploads_expire(environment)
    maintenance.run_once()
    assert environment.storage.keys() == [image]
    environment.cancel(running)
    let_uploads_expire(environment)
    with environment.database.write() as transaction:
        lifecycle.acknowledge_cancel(transaction, lease)
    maintenance.run_once()
    assert environment.storage.keys() == []


def test_an_upload_is_deleted_after_a_storage_outage(
    environment: Environment, maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = upload(environment, "past")
    let_uploads_expire(environment)

    def refuse(_keys: object) -> None:
        raise StorageError("the storage is down")

    with monkeypatch.context() as patched:
        patched.setattr(environment.storage, "delete", refuse)
        maintenance.run_once()
    assert environment.storage.keys() == [key]
    environment.delete_leftovers()
    assert environment.storage.keys() == []


def test_objects_that_cannot_be_deleted_keep_no_others(
    environment: Environment, maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [environment.submit() for _ in range(6)]
    environment.generate_due()
    names = [upload(environment, f"upload {number}") for number in range(6)]
    let_uploads_expire(environment)
    with environment.database.write() as transaction:
        for number, job_id in enumerate(jobs):
            queries.get(transaction, job_id).expires_at = transaction.now - timedelta(hours=1, seconds=-number)
    bad = {*names[:4], *(f"jobs/{job_id}/1-0.png" for job_id in jobs[:4])}
    delete = environment.storage.delete

    def refuse(keys: list[str]) -> None:
        if bad.intersection(keys):
            raise StorageError("the object is locked")
        delete(keys)

    monkeypatch.setattr(environment.storage, "delete", refuse)
    for _ in range(8):
        environment.delete_leftovers()
        maintenance.run_once()
    assert set(environment.storage.keys()) == bad


def test_an_upload_that_a_job_uses_does_not_keep_maintenance_busy(
    environment: Environment, maintenance: Maintenance
) -> None:
    environment.submit(image=address(upload(environment, "image")))
    let_uploads_expire(environment)
    maintenance.run_once()
    with environment.database.read() as transaction:
        assert not agenda.ask(transaction, WORK, "anyone", 0.5).expired_uploads


def test_an_upload_of_bytes_that_are_being_deleted_is_stored(
    environment: Environment, maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = upload(environment, "past")
    let_uploads_expire(environment)
    delete = environment.storage.delete
    with ThreadPoolExecutor(1) as pool:
        uploads: list[Future[str]] = []

        def delete_late(keys: list[str]) -> None:
            uploads.append(pool.submit(upload, environment, "past"))
            uploads[0].result(timeout=30)  # no transaction is open while storage is used
            delete(keys)

        monkeypatch.setattr(environment.storage, "delete", delete_late)
        maintenance.run_once()
        again = uploads[0].result(30)
    assert again != key
    assert environment.storage.keys() == [again]
    with environment.database.read() as transaction:
        assert [row.storage_key for row in transaction.session.query(Input)] == [again]


def test_jobs_that_ended_long_ago_are_deleted_some_at_a_time_or_with_their_week(
    environment: Environment, each_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "FORGOTTEN_AT_ONCE", 2)
    for _ in range(5):
        environment.cancel(environment.submit())
    later = datetime.now(UTC) + timedelta(seconds=JobsSettings().history_s, weeks=1)
    with contextlib.closing(Database(each_database_url, clock=lambda: later)) as database:
        young = dataclasses.replace(environment, database=database).submit()
        dataclasses.replace(environment, database=database).maintenance(Shutdown(0)).run_once()
        with database.read() as transaction:
            assert [job.id for job in transaction.session.query(Job)] == [young]
