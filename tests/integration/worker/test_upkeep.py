"""The clock: what was lost is found, what is over is cleared, and nothing stops the clock itself."""

import contextlib
import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest

from tests.integration.worker.conftest import Studio
from tests.integration.worker.painter import Bell
from tests.waiting import wait_until
from worker.shutdown import Shutdown
from worker.upkeep import Upkeep
from zcore.errors import StorageError
from zcore.jobs import inputs, lifecycle, presence, queries
from zcore.jobs.inputs import UploadedPicture
from zcore.jobs.models import Input, Worker
from zcore.stages import Stage


@pytest.fixture
def bell(studio: Studio) -> Bell:
    """What upkeep rings."""
    return studio.bell


@pytest.fixture
def upkeep(studio: Studio, bell: Bell) -> Upkeep:
    """A clock that ticks when told."""
    return Upkeep(studio.database, studio.storage, bell, studio.ended.set, 0.05, Shutdown(0))


def claimed(studio: Studio, lease_s: float) -> lifecycle.Lease:
    """A worker that will never be heard of again."""
    with studio.database.write() as transaction:
        job = lifecycle.claim(transaction, "worker-9", lease_s)
    assert job is not None
    return lifecycle.lease_of(job)


def test_a_job_of_a_dead_worker_goes_back_to_the_queue_and_is_rung_for(
    studio: Studio, upkeep: Upkeep, bell: Bell
) -> None:
    job_id = studio.submit()
    claimed(studio, lease_s=-1)
    upkeep.tick()
    assert studio.look(job_id).status == "queued"
    assert bell.rings == 1
    assert not studio.ended.is_set()


def test_a_job_whose_worker_lives_is_left_alone(studio: Studio, upkeep: Upkeep, bell: Bell) -> None:
    job_id = studio.submit()
    claimed(studio, lease_s=60)
    upkeep.tick()
    assert (studio.look(job_id).status, bell.rings) == ("running", 0)


@pytest.mark.parametrize("stored_as", ["png", "avif"])
def test_a_job_without_attempts_left_fails_its_pictures_go_and_its_caller_is_told(
    studio: Studio, upkeep: Upkeep, stored_as: str
) -> None:
    job_id = studio.submit(max_attempts=1, n=2, format=stored_as)
    claimed(studio, lease_s=-1)
    studio.storage.put(f"jobs/{job_id}/1-1.{stored_as}", b"stored, then killed", f"image/{stored_as}")
    upkeep.tick()
    assert (studio.look(job_id).status, studio.look(job_id).error_code) == ("failed", "worker_lost")
    assert studio.storage.pictures() == []
    assert studio.ended.is_set()


def test_what_a_row_without_a_format_left_is_deleted_as_png(studio: Studio, upkeep: Upkeep) -> None:
    job_id = studio.submit(max_attempts=1)
    with studio.database.write() as transaction:
        job = queries.get(transaction, job_id)
        job.request = {name: value for name, value in job.request.items() if name != "format"}
    claimed(studio, lease_s=-1)
    studio.storage.put(f"jobs/{job_id}/1-0.png", b"stored by the version before", "image/png")
    upkeep.tick()
    assert studio.storage.pictures() == []


def test_a_job_nobody_was_told_of_is_rung_for_once_in_a_while(studio: Studio, upkeep: Upkeep, bell: Bell) -> None:
    job_id = studio.submit()
    upkeep.tick()
    assert bell.rings == 0, "its submission has rung"
    with studio.database.write() as transaction:
        queries.get(transaction, job_id).announced_at -= timedelta(seconds=6)  # type: ignore[operator]
    upkeep.tick()
    upkeep.tick()
    assert bell.rings == 1


def test_busy_workers_are_not_rung_for_and_each_idle_one_is_once(studio: Studio, upkeep: Upkeep, bell: Bell) -> None:
    for _ in range(10):
        studio.submit()
    claimed(studio, lease_s=60)  # by worker-9
    with studio.database.write() as transaction:
        presence.show(transaction, "worker-9", "a model", "cpu")
        for job in queries.page(transaction, queries.JobFilter(), None, 50).jobs:
            job.announced_at -= timedelta(seconds=6)  # type: ignore[operator]
    upkeep.tick()
    assert bell.rings == 0, "it takes what is due by itself"
    with studio.database.write() as transaction:
        presence.show(transaction, "worker-1", "a model", "cpu")
        presence.show(transaction, "worker-2", "a model", "cpu")
    upkeep.tick()
    assert bell.rings == 2


def test_rings_are_for_workers_of_the_stage_that_jobs_wait_at(studio: Studio, upkeep: Upkeep, bell: Bell) -> None:
    for stage in (Stage.ENCODE, Stage.ENCODE, Stage.ENCODE, Stage.GENERATE, Stage.GENERATE):
        studio.submit(stage=stage)
    with studio.database.write() as transaction:
        for name in ("cpu-1", "cpu-2"):
            presence.show(transaction, name, "a model", "cpu", [Stage.ENCODE])
        for job in queries.page(transaction, queries.JobFilter(), None, 50).jobs:
            job.announced_at -= timedelta(seconds=6)  # type: ignore[operator]
    upkeep.tick()
    assert bell.rung == [Stage.ENCODE, Stage.ENCODE, Stage.GENERATE], "one is tried where nobody is seen"


def test_pictures_past_their_time_are_deleted_and_their_job_expires(studio: Studio, upkeep: Upkeep) -> None:
    kept, past = studio.submit(n=2), studio.submit(n=2)
    studio.work()
    with studio.database.write() as transaction:
        queries.get(transaction, past).expires_at = transaction.now
    upkeep.tick()
    assert (studio.look(kept).status, studio.look(past).status) == ("succeeded", "expired")
    assert studio.storage.pictures() == [f"jobs/{kept}/1-{index}.png" for index in range(2)]
    assert len(studio.look(past).outputs) == 2, "what there was stays on record"


def test_pictures_that_cannot_be_deleted_now_are_deleted_later(
    studio: Studio, upkeep: Upkeep, bell: Bell, monkeypatch: pytest.MonkeyPatch
) -> None:
    past = studio.submit()
    studio.work()
    with studio.database.write() as transaction:
        queries.get(transaction, past).expires_at = transaction.now

    def refuse(_keys: object) -> None:
        raise StorageError("the store is down")

    with monkeypatch.context() as patched:
        patched.setattr(studio.storage, "delete", refuse)
        upkeep.tick()
        assert studio.look(past).status == "succeeded"
    upkeep.tick()
    assert (studio.look(past).status, studio.storage.pictures()) == ("expired", [])


def test_no_defect_of_one_chore_keeps_the_others_from_their_turn(
    studio: Studio, bell: Bell, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutdown = Shutdown(0)
    upkeep = Upkeep(studio.database, studio.storage, bell, studio.ended.set, 0.02, shutdown)

    def crash(_transaction: object) -> None:
        raise ValueError

    past = studio.submit()
    studio.work()
    with studio.database.write() as transaction:
        queries.get(transaction, past).expires_at = transaction.now
    monkeypatch.setattr(lifecycle, "rescue", crash)
    upkeep.start()
    wait_until(lambda: studio.look(past).status == "expired")
    monkeypatch.undo()
    job_id = studio.submit()
    claimed(studio, lease_s=-1)
    wait_until(lambda: studio.look(job_id).status == "queued")
    shutdown.begin()
    upkeep.stop()


def test_workers_not_seen_for_a_day_are_forgotten(studio: Studio, upkeep: Upkeep) -> None:
    with studio.database.write() as transaction:
        for name in ("here", "gone"):
            presence.show(transaction, name, "demo", "cpu")
        transaction.session.flush()
        gone = transaction.session.get(Worker, "gone")
        assert gone is not None
        gone.seen_at -= timedelta(days=2)
    upkeep.tick()
    with studio.database.read() as transaction:
        assert [worker.name for worker in transaction.session.query(Worker)] == ["here"]


def upload(studio: Studio, name: str, owner: str = "anna") -> str:
    """The key of an upload whose time ends in a moment."""
    sha256 = hashlib.sha256(name.encode()).hexdigest()
    with studio.database.write() as transaction:
        inputs.keep(transaction, owner, UploadedPicture(sha256, "png", 64, 64, 3), retention_s=60)
    studio.storage.put(inputs.key_of(owner, sha256), b"png", "image/png")
    return inputs.key_of(owner, sha256)


def address(key: str) -> str:
    """What a request says for it."""
    return f"input:{key.rpartition('/')[2]}"


def let_uploads_expire(studio: Studio) -> None:
    """All of them, two minutes ago."""
    with studio.database.write() as transaction:
        for row in transaction.session.query(Input):
            row.expires_at = transaction.now - timedelta(minutes=2)


def test_uploads_past_their_time_are_deleted(studio: Studio, upkeep: Upkeep) -> None:
    for name in ("past", "past too"):
        upload(studio, name)
    let_uploads_expire(studio)
    kept = upload(studio, "kept")
    upkeep.tick()
    assert studio.storage.pictures() == [kept]
    with studio.database.read() as transaction:
        assert [inputs.key_of(row.owner, row.sha256) for row in transaction.session.query(Input)] == [kept]


def test_an_upload_is_spared_for_a_moment_after_its_time(studio: Studio, upkeep: Upkeep) -> None:
    key = upload(studio, "just past")
    with studio.database.write() as transaction:
        transaction.session.query(Input).one().expires_at = transaction.now - timedelta(seconds=30)
    upkeep.tick()
    assert studio.storage.pictures() == [key], "a submission that found it may not be on record yet"


def test_an_upload_that_a_job_still_needs_is_kept_until_that_has_ended(studio: Studio, upkeep: Upkeep) -> None:
    image, mask = upload(studio, "image"), upload(studio, "mask")
    same_of_ben = upload(studio, "image", owner="ben")
    running = studio.submit(image=address(image))
    lease = claimed(studio, lease_s=60)
    queued = studio.submit(image=address(image), mask=address(mask))
    studio.submit(image="https://pictures.example/cat.png")
    let_uploads_expire(studio)
    upkeep.tick()
    assert studio.storage.pictures() == sorted([image, mask]), f"{same_of_ben} is nobody's any more"
    studio.cancel(queued)
    upkeep.tick()
    assert studio.storage.pictures() == [image]
    studio.cancel(running)
    with studio.database.write() as transaction:
        lifecycle.acknowledge_cancel(transaction, lease)
    upkeep.tick()
    assert studio.storage.pictures() == []


def test_an_upload_that_cannot_be_deleted_now_is_deleted_later(
    studio: Studio, upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = upload(studio, "past")
    let_uploads_expire(studio)

    def refuse(_keys: object) -> None:
        raise StorageError("the store is down")

    with monkeypatch.context() as patched:
        patched.setattr(studio.storage, "delete", refuse)
        upkeep.tick()
    assert studio.storage.pictures() == [key]
    upkeep.tick()
    assert studio.storage.pictures() == []


def test_an_upload_of_what_is_just_being_deleted_is_there_afterwards(
    studio: Studio, upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = upload(studio, "past")
    let_uploads_expire(studio)
    delete = studio.storage.delete
    with ThreadPoolExecutor(1) as pool:
        uploads: list[Future[str]] = []

        def delete_late(keys: list[str]) -> None:
            uploads.append(pool.submit(upload, studio, "past"))
            with contextlib.suppress(TimeoutError):
                uploads[0].result(timeout=0.3)  # it could store its bytes now, where nothing held it back
            delete(keys)

        monkeypatch.setattr(studio.storage, "delete", delete_late)
        upkeep.tick()
        assert uploads[0].result(30) == key
    assert studio.storage.pictures() == [key]
