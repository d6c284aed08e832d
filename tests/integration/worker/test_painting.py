"""One job after another: every way from a claim to an end, on a real record, with a painter in place of the model."""

import hashlib
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from uuid import UUID

import pytest
from PIL import Image
from sqlalchemy import make_url

from tests.integration.broker.cable import cable_to
from tests.integration.worker.conftest import ShakyStorage, Studio
from tests.integration.worker.painter import Bell, Painter, Relief, Scribe
from tests.services.postgres import Postgres
from tests.waiting import wait_until
from zcore.errors import InvalidRequest, OutOfMemory
from zcore.imaging.encode import read_parameters
from zcore.jobs import lifecycle, queries
from zcore.jobs.database import Database
from zcore.request import GenerationRequest


def test_everything_due_is_painted_in_one_go_the_urgent_first(studio: Studio) -> None:
    for priority in (0, 5, -5, 5):
        studio.submit(prompt=f"of {priority}", priority=priority)
    assert studio.work() == 4
    assert [request.prompt for request in studio.painter.begun] == ["of 5", "of 5", "of 0", "of -5"]
    assert studio.work() == 0


def test_a_succeeded_job_has_its_pictures_as_they_lie_in_storage(studio: Studio) -> None:
    job_id = studio.submit(n=2, width=128, seed=7)
    studio.work()
    job = studio.look(job_id)
    assert job.status == "succeeded"
    assert [(o.position, o.key, o.width, o.height, o.seed) for o in job.outputs] == [
        (0, f"jobs/{job_id}/1-0.png", 128, 64, 7), (1, f"jobs/{job_id}/1-1.png", 128, 64, 8),
    ]  # fmt: skip
    for output in job.outputs:
        content = studio.storage.get(output.key)
        assert (output.bytes, output.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        parameters = read_parameters(content)
        assert parameters is not None
        assert parameters.request.seed == output.seed
    assert job.engine == {"engine": "a painter for tests"}
    assert set(job.metrics) == {
        "queue_ms", "encode_ms", "denoise_ms", "decode_ms", "peak_vram_mb", "upload_ms", "total_ms",
    }  # fmt: skip
    assert studio.ended.is_set(), "whoever delivers webhooks is woken"


@pytest.mark.parametrize("stored_as", ["png", "jpeg", "webp", "avif"])
def test_a_picture_is_stored_in_the_format_asked_for(studio: Studio, stored_as: str) -> None:
    job_id = studio.submit(format=stored_as)
    studio.work()
    (output,) = studio.look(job_id).outputs
    assert (output.format, output.key) == (stored_as, f"jobs/{job_id}/1-0.{stored_as}")
    with Image.open(io.BytesIO(studio.storage.get(output.key))) as picture:
        assert picture.format == stored_as.upper()


def test_progress_is_on_the_row_while_it_is_made(studio: Studio) -> None:
    job_id = studio.submit(steps=4)

    def look(_request: GenerationRequest, step: int) -> None:
        if step:
            wait_until(lambda: studio.look(job_id).progress_step == step - 1 and studio.look(job_id).progress_phase)

    studio.painter.between = look
    studio.work()
    assert studio.look(job_id).status == "succeeded"


def test_a_cancel_stops_the_painting_at_the_next_step(studio: Studio) -> None:
    job_id = studio.submit(steps=50)

    def cancel(_request: GenerationRequest, step: int) -> None:
        if step == 3:
            studio.cancel(job_id)
            studio.wait_for_a_beat(job_id)
            studio.wait_for_a_beat(job_id)

    studio.painter.between = cancel
    studio.work()
    assert studio.painter.told == [0, 1, 2, 3], "step 3 was told and never made"
    assert studio.look(job_id).status == "canceled"
    assert studio.storage.pictures() == []


def test_after_a_cancel_the_next_job_is_painted(studio: Studio) -> None:
    first, second = studio.submit(prompt="first"), studio.submit(prompt="second")

    def cancel(request: GenerationRequest, step: int) -> None:
        if request.prompt == "first" and step == 1:
            studio.cancel(first)
            studio.wait_for_a_beat(first)
            studio.wait_for_a_beat(first)

    studio.painter.between = cancel
    studio.work()
    assert (studio.look(first).status, studio.look(second).status) == ("canceled", "succeeded")


def test_who_is_asked_to_leave_finishes_the_job_in_hand_and_takes_no_other(studio: Studio) -> None:
    first, second = studio.submit(), studio.submit()
    generator, shutdown = studio.generator(grace_s=60)
    studio.painter.between = lambda _request, _step: shutdown.begin()
    assert generator.drain() == 1
    generator.finish()
    assert (studio.look(first).status, studio.look(second).status) == ("succeeded", "queued")


def test_who_has_no_time_left_hands_the_job_back_uncounted(studio: Studio) -> None:
    job_id = studio.submit()
    generator, shutdown = studio.generator(grace_s=0)
    studio.painter.between = lambda _request, step: shutdown.begin() if step == 2 else None
    generator.drain()
    generator.finish()
    job = studio.look(job_id)
    assert (job.status, job.attempts_left, job.progress_phase) == ("queued", 3, None)
    assert studio.events(job_id) == ["queued", "claimed", "handed_back"]
    assert studio.painter.told == [0, 1, 2]
    studio.painter.between = lambda _request, _step: None
    assert studio.work() == 1
    assert studio.look(job_id).status == "succeeded"


def test_a_lease_lost_while_painting_ends_it_without_a_word(studio: Studio) -> None:
    job_id = studio.submit(steps=50)

    def lose(_request: GenerationRequest, step: int) -> None:
        if step == 2:
            studio.lose(job_id)
        if step > 2:
            threading.Event().wait(0.02)

    studio.painter.between = lose
    studio.work()
    assert len(studio.painter.told) < 50
    assert_belongs_to_the_other(studio, job_id)


def test_a_lease_lost_while_storing_writes_nothing_and_takes_its_pictures_away(studio: Studio) -> None:
    job_id = studio.submit(n=2)
    studio.storage.after_put = lambda key: studio.lose(job_id) if key.endswith("1-1.png") else None
    studio.work()
    assert_belongs_to_the_other(studio, job_id)


def assert_belongs_to_the_other(studio: Studio, job_id: UUID) -> None:
    """Nothing of the first worker's is left."""
    job = studio.look(job_id)
    assert (job.status, job.worker, job.attempt, job.outputs) == ("running", "worker-2", 2, [])
    assert studio.events(job_id) == ["queued", "claimed", "rescued", "claimed"]
    assert studio.storage.pictures() == []


def test_a_store_that_is_down_for_a_while_costs_the_painting_no_time(studio: Studio) -> None:
    jobs = [studio.submit(prompt=f"number {index}") for index in range(3)]
    studio.storage.is_down = True
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(studio.work)
        wait_until(lambda: len(studio.painter.begun) == 3 and studio.storage.refused >= 3)
        assert [studio.look(job).status for job in jobs] == ["running"] * 3
        studio.storage.is_down = False
        assert working.result() == 3
    assert [studio.look(job).status for job in jobs] == ["succeeded"] * 3
    assert [studio.look(job).attempt for job in jobs] == [1, 1, 1]


def test_not_more_pictures_wait_for_their_store_than_the_memory_is_meant_to_hold(studio: Studio) -> None:
    """Four by default: the fifth is painted and then held, the sixth is not begun."""
    for _ in range(8):
        studio.submit()
    studio.storage.is_down = True
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(studio.work)
        wait_until(lambda: len(studio.painter.begun) == 5 and studio.storage.refused >= 8)
        assert len(studio.painter.begun) == 5
        studio.storage.is_down = False
        assert working.result() == 8


def test_a_store_that_is_down_for_too_long_fails_the_attempt_and_in_the_end_the_job(studio: Studio) -> None:
    job_id = studio.submit(max_attempts=2)
    studio.storage.is_down = True
    studio.work(upload_retry_s=0)
    studio.work(upload_retry_s=0)  # unless the first was still there when the job came back
    job = studio.look(job_id)
    assert (job.status, job.error_code, job.error_retryable) == ("failed", "storage_unavailable", True)
    assert studio.events(job_id) == ["queued", "claimed", "postponed", "claimed", "failed"]


def test_of_an_upload_given_up_nothing_stays(studio: Studio) -> None:
    def break_down(_key: str) -> None:
        studio.storage.is_down = True

    job_id = studio.submit(n=3, max_attempts=1)
    studio.storage.after_put = break_down
    studio.work(upload_retry_s=0)
    assert studio.look(job_id).status == "failed"
    assert studio.storage.pictures() == []


def test_a_cancel_ends_the_wait_for_a_store_that_is_down(studio: Studio) -> None:
    job_id = studio.submit()
    studio.storage.is_down = True
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(studio.work, upload_retry_s=3600)
        wait_until(lambda: studio.storage.refused > 0)
        studio.cancel(job_id)
        try:
            wait_until(lambda: studio.look(job_id).status != "running", timeout_s=15)
        finally:
            studio.storage.is_down = False
        working.result()
    assert studio.look(job_id).status == "canceled"


def test_who_leaves_while_the_store_is_down_hands_the_job_back(studio: Studio) -> None:
    job_id = studio.submit()
    studio.storage.is_down = True
    generator, shutdown = studio.generator(grace_s=1.0)
    generator.drain()
    wait_until(lambda: studio.storage.refused > 0)
    shutdown.begin()
    generator.finish()
    job = studio.look(job_id)
    assert (job.status, job.attempts_left) == ("queued", 3)
    assert studio.events(job_id)[-1] == "handed_back"
    assert studio.storage.refused < 20, "it waits between its tries also when leaving"


def test_an_unexpected_error_is_tried_again_and_tells_callers_nothing_of_the_inside(studio: Studio) -> None:
    def crash(_request: GenerationRequest, _step: int) -> None:
        raise RuntimeError("the password is swordfish")

    job_id = studio.submit(max_attempts=2)
    studio.painter.between = crash
    studio.work()
    job = studio.look(job_id)
    assert (job.status, job.attempt, job.error_code) == ("failed", 2, "internal_error")
    assert "swordfish" not in (job.error_message or "")


def test_a_worker_whose_every_job_crashes_leaves_before_it_spoils_the_queue(studio: Studio) -> None:
    def crash(_request: GenerationRequest, _step: int) -> None:
        raise RuntimeError("something is wrong with this process")

    ids = [studio.submit(max_attempts=1) for _ in range(6)]
    studio.painter.between = crash
    assert studio.work() == 3
    assert studio.broken.is_set()
    assert [studio.look(job_id).status for job_id in ids] == ["failed"] * 3 + ["queued"] * 3


def test_a_worker_whose_gpu_has_failed_leaves_at_once(studio: Studio) -> None:
    def crash(_request: GenerationRequest, _step: int) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    studio.submit()
    studio.submit()
    studio.painter.between = crash
    assert studio.work() == 1
    assert studio.broken.is_set()


def test_a_crash_now_and_then_is_no_reason_to_leave(studio: Studio) -> None:
    def crash(request: GenerationRequest, _step: int) -> None:
        if request.seed % 2:
            raise RuntimeError("this job only")

    for seed in range(8):
        studio.submit(max_attempts=1, seed=seed)
    studio.painter.between = crash
    assert studio.work() == 8
    assert not studio.broken.is_set()


def test_what_memory_made_the_pipeline_give_up_is_in_the_timeline(studio: Studio) -> None:
    relieved = [Relief("batch_split", "2 pictures are painted at once instead of 4"), Relief("vae_tiled", "tiles")]

    def overflow(request: GenerationRequest, step: int) -> None:
        if request.prompt == "too large" and step == 3:
            raise OutOfMemory("64x64 does not fit")

    painter = Painter(overflow, reliefs={2: list(relieved)})
    job_id = studio.submit(prompt="too large", steps=5)
    studio.work(painter=painter)
    assert studio.look(job_id).error_code == "gpu_out_of_memory"
    with studio.database.read() as transaction:
        events = queries.timeline(transaction, job_id).events
    assert [event.type for event in events] == ["queued", "claimed", "memory_relieved", "memory_relieved", "failed"]
    assert [event.detail["what"] for event in events[2:4]] == [one.sentence for one in relieved]
    painter.reliefs = {0: list(relieved)}
    small = studio.submit(prompt="small")
    studio.work(painter=painter)
    assert studio.look(small).status == "succeeded"
    with studio.database.read() as transaction:
        events = queries.timeline(transaction, small).events
    assert [event.type for event in events] == ["queued", "claimed", "memory_relieved", "memory_relieved", "succeeded"]


def test_who_has_lost_its_lease_adds_nothing_to_the_timeline(studio: Studio) -> None:
    job_id = studio.submit()
    with studio.database.write() as transaction:
        claimed = lifecycle.claim(transaction, "first", lease_s=30)
        assert claimed is not None
        lost = lifecycle.lease_of(claimed)
    with studio.database.write() as transaction:
        assert lifecycle.note(transaction, lost, "memory_relieved", {"what": "tiles"}) is True
        lifecycle.hand_back(transaction, lost)
    with studio.database.write() as transaction:
        assert lifecycle.note(transaction, lost, "memory_relieved", {"what": "tiles"}) is False
    with studio.database.read() as transaction:
        events = queries.timeline(transaction, job_id).events
    assert [event.type for event in events] == ["queued", "claimed", "memory_relieved", "handed_back"]


def test_what_no_repeat_can_mend_fails_at_once(studio: Studio) -> None:
    def refuse(_request: GenerationRequest, _step: int) -> None:
        raise InvalidRequest.field("width", "is more than this checkpoint can place")

    job_id = studio.submit()
    studio.painter.between = refuse
    studio.work()
    job = studio.look(job_id)
    assert (job.status, job.attempt, job.error_code) == ("failed", 1, "invalid_request")
    assert job.error_message == "width: is more than this checkpoint can place"


def test_what_a_lost_attempt_stored_is_cleared_away_by_the_one_that_succeeds(studio: Studio) -> None:
    job_id = studio.submit()
    with studio.database.write() as transaction:
        claimed = lifecycle.claim(transaction, "worker-0", 60)
        assert claimed is not None
        lifecycle.hand_back(transaction, lifecycle.lease_of(claimed))
    studio.storage.put(f"jobs/{job_id}/1-0.png", b"half a life", "image/png")
    studio.work()
    assert studio.storage.pictures() == [f"jobs/{job_id}/2-0.png"]


def test_two_workers_share_the_queue_and_paint_each_job_once(studio: Studio) -> None:
    jobs = [studio.submit(prompt=f"number {index}") for index in range(20)]
    painters = [Painter(), Painter()]
    with ThreadPoolExecutor(2) as pool:
        taken = list(pool.map(lambda i: studio.work(name=f"worker-{i}", painter=painters[i]), range(2)))
    assert sum(taken) == 20
    painted = [request.prompt for painter in painters for request in painter.begun]
    assert sorted(painted) == sorted(f"number {index}" for index in range(20))
    assert {studio.look(job).status for job in jobs} == {"succeeded"}
    assert {studio.look(job).attempt for job in jobs} == {1}


def test_a_database_that_is_gone_when_the_pictures_are_stored_loses_no_job(
    postgres: Postgres, database_url: str, tmp_path: Path
) -> None:
    """The end cannot be written; the lease runs out, the job is rescued and painted again, the first pictures go."""
    assert postgres.url.port is not None
    storage = ShakyStorage(tmp_path / "storage", "http://127.0.0.1:8000", "key", link_expiry_s=60)
    storage.root = tmp_path / "storage"
    with cable_to(postgres.url.port) as cable, closing(Database(database_url)) as direct:
        remote = make_url(database_url).set(port=cable.port).render_as_string(hide_password=False)
        with closing(Database(remote)) as database:
            studio = Studio(database, storage, Painter(), Scribe(), Bell(), threading.Event())
            job_id = studio.submit()
            storage.after_put = lambda _key: cable.cut()
            studio.work(lease_s=1.0)
            cable.plug()
            storage.after_put = lambda _key: None
            assert studio.look(job_id).status == "running"
            assert storage.pictures() == [f"jobs/{job_id}/1-0.png"]

            def rescued() -> bool:
                with direct.write() as transaction:
                    return bool(lifecycle.rescue(transaction))

            wait_until(rescued)
            studio.work()
            assert (studio.look(job_id).status, studio.look(job_id).attempt) == ("succeeded", 2)
            assert storage.pictures() == [f"jobs/{job_id}/2-0.png"]


@pytest.mark.timeout(60)
def test_a_database_that_is_silent_for_longer_than_the_lease_stops_the_painting(
    postgres: Postgres, database_url: str, tmp_path: Path
) -> None:
    """Nobody knows by then whether another worker has the job."""
    assert postgres.url.port is not None
    storage = ShakyStorage(tmp_path / "storage", "http://127.0.0.1:8000", "key", link_expiry_s=60)
    with cable_to(postgres.url.port) as cable:
        remote = make_url(database_url).set(port=cable.port).render_as_string(hide_password=False)
        with closing(Database(remote)) as database:
            studio = Studio(database, storage, Painter(), Scribe(), Bell(), threading.Event())
            studio.submit(steps=50)

            def go_silent(_request: GenerationRequest, step: int) -> None:
                if step == 1:
                    cable.cut()
                if step > 1:
                    threading.Event().wait(0.2)

            studio.painter.between = go_silent
            generator, _ = studio.generator(lease_s=1.0)
            generator.drain()
            generator.finish()
            assert len(studio.painter.told) < 50
