"""The clock: what was lost is found, what is over is cleared, and nothing stops the clock itself."""

from datetime import timedelta

import pytest

from tests.integration.worker.conftest import Studio
from tests.integration.worker.painter import Bell
from tests.waiting import wait_until
from worker.shutdown import Shutdown
from worker.upkeep import Upkeep
from zcore.jobs import lifecycle, presence, queries
from zcore.jobs.models import Worker
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
    from zcore.errors import StorageError

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
