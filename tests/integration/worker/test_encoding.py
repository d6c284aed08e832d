"""A prompt encoded by one worker and painted by another: what lies between them, and what becomes of it."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.integration.worker.conftest import Studio
from tests.integration.worker.painter import Scribe
from tests.waiting import wait_until
from worker.shutdown import Shutdown
from worker.upkeep import Upkeep
from zcore.errors import InvalidRequest, StorageError
from zcore.imaging.encode import read_parameters
from zcore.jobs import lifecycle, queries
from zcore.request import GenerationRequest
from zcore.stages import Stage

PAINTS_ONLY = {"stages": (Stage.GENERATE,)}


@pytest.fixture
def upkeep(studio: Studio) -> Upkeep:
    """A clock that ticks when told."""
    return Upkeep(studio.database, studio.storage, studio.bell, studio.ended.set, 0.05, Shutdown(0))


def test_a_split_job_is_encoded_once_and_painted_once_from_that(studio: Studio) -> None:
    job_id = studio.submit(stage=Stage.ENCODE, prompt="a heron")
    assert studio.work(**PAINTS_ONLY) == 0, "nobody has encoded it yet"
    assert studio.encode() == 1
    assert studio.storage.pictures() == [f"jobs/{job_id}/embedding-1.safetensors"]
    assert studio.bell.rung == [Stage.GENERATE]
    assert studio.work(**PAINTS_ONLY) == 1
    assert (studio.scribe.encoded, studio.painter.painted_from) == (["a heron"], ["a heron"])
    job = studio.look(job_id)
    assert (job.status, job.attempt, job.attempts_left) == ("succeeded", 2, 2)
    assert studio.events(job_id) == ["queued", "claimed", "encoded", "claimed", "succeeded"]


def test_what_the_encoder_measured_and_was_is_told_of_the_picture_too(studio: Studio) -> None:
    job_id = studio.submit(stage=Stage.ENCODE)
    studio.encode()
    with studio.database.write() as transaction:
        job = queries.get(transaction, job_id)
        job.metrics = {"queue_ms": 1000, "encode_ms": 200, "upload_ms": 30}
    studio.work(**PAINTS_ONLY)
    job = studio.look(job_id)
    assert job.metrics["encode_ms"] == 200
    assert job.metrics["queue_ms"] >= 1000
    assert job.metrics["upload_ms"] >= 30
    parts = ("queue_ms", "encode_ms", "denoise_ms", "decode_ms", "upload_ms")
    assert job.metrics["total_ms"] == sum(job.metrics[name] for name in parts)
    made_by = {"engine": "a painter for tests", "encoder": "a scribe for tests"}
    assert job.engine == made_by
    parameters = read_parameters(studio.storage.get(job.outputs[0].key))
    assert parameters is not None
    assert parameters.made_by == made_by


def test_who_serves_both_stages_does_a_whole_job_without_storage_between(studio: Studio) -> None:
    job_id = studio.submit(stage=Stage.ENCODE)
    assert studio.work() == 1
    assert (studio.look(job_id).status, studio.painter.painted_from) == ("succeeded", [])
    assert studio.storage.pictures() == [f"jobs/{job_id}/1-0.png"]


def test_who_serves_both_stages_uses_what_another_has_encoded(studio: Studio) -> None:
    studio.submit(stage=Stage.ENCODE, prompt="a heron")
    studio.encode()
    studio.work()
    assert studio.painter.painted_from == ["a heron"]


@pytest.mark.parametrize("fault", ["gone", "spoiled", "of another model"])
def test_an_embedding_that_cannot_be_used_is_made_again(studio: Studio, upkeep: Upkeep, fault: str) -> None:
    job_id = studio.submit(stage=Stage.ENCODE)
    studio.encode(scribe=Scribe(model="another model" if fault == "of another model" else "a model"))
    key = f"jobs/{job_id}/embedding-1.safetensors"
    if fault == "gone":
        studio.storage.delete([key])
    elif fault == "spoiled":
        studio.storage.put(key, b"half of it", "application/octet-stream")
    studio.bell.rung.clear()
    studio.work(**PAINTS_ONLY)
    job = studio.look(job_id)
    assert (job.status, job.stage, job.attempts_left) == ("queued", "encode", 2)
    assert studio.bell.rung == [Stage.ENCODE]
    studio.encode()
    studio.work(**PAINTS_ONLY)
    assert studio.look(job_id).status == "succeeded"
    upkeep.tick()
    assert studio.storage.pictures() == [f"jobs/{job_id}/4-0.png"]


def test_an_encoder_of_another_model_does_not_keep_a_job_going_for_ever(studio: Studio) -> None:
    job_id = studio.submit(stage=Stage.ENCODE, max_attempts=2)
    stranger = Scribe(model="another model")
    for _ in range(5):
        studio.encode(scribe=stranger)
        studio.work(**PAINTS_ONLY)
    job = studio.look(job_id)
    assert (job.status, job.error_code, len(stranger.encoded)) == ("failed", "embedding_lost", 2)
    assert "another model" in (job.error_message or "")


@pytest.mark.parametrize("fault", ["gone", "of another model"])
def test_who_can_encode_does_so_where_the_embedding_cannot_be_used(studio: Studio, fault: str) -> None:
    job_id = studio.submit(stage=Stage.ENCODE)
    studio.encode(scribe=Scribe(model="another model"))
    if fault == "gone":
        studio.storage.delete([f"jobs/{job_id}/embedding-1.safetensors"])
    studio.work()
    job = studio.look(job_id)
    assert (job.status, job.attempt, studio.painter.painted_from) == ("succeeded", 2, [])
    assert job.engine == {"engine": "a painter for tests"}


def test_a_job_submitted_whole_is_sent_to_be_encoded_by_who_only_paints(studio: Studio) -> None:
    job_id = studio.submit(max_attempts=1)
    studio.work(**PAINTS_ONLY)
    assert studio.bell.rung == [Stage.ENCODE]
    studio.encode()
    studio.work(**PAINTS_ONLY)
    assert studio.look(job_id).status == "succeeded"
    assert studio.events(job_id) == [
        "queued", "claimed", "sent_to_encode", "claimed", "encoded", "claimed", "succeeded",
    ]  # fmt: skip


def test_who_only_paints_fetches_nothing_for_a_prompt_that_is_not_encoded_yet(studio: Studio) -> None:
    job_id = studio.submit(image="http://127.0.0.1:1/nobody-listens.png")
    studio.work(**PAINTS_ONLY)
    assert studio.events(job_id) == ["queued", "claimed", "sent_to_encode"]


def test_what_no_repeat_can_mend_fails_where_it_is_encoded(studio: Studio, upkeep: Upkeep) -> None:
    def refuse(_request: GenerationRequest) -> None:
        raise InvalidRequest.field("template", "there is none of this name")

    job_id = studio.submit(stage=Stage.ENCODE)
    studio.encode(scribe=Scribe(before=refuse))
    assert (studio.look(job_id).status, studio.look(job_id).error_code) == ("failed", "invalid_request")
    upkeep.tick()
    assert studio.look(job_id).embedding_attempt is None


def test_a_cancel_while_a_prompt_is_encoded_ends_the_job_there(studio: Studio, upkeep: Upkeep) -> None:
    job_id = studio.submit(stage=Stage.ENCODE)

    def cancel(_request: GenerationRequest) -> None:
        studio.cancel(job_id)
        studio.wait_for_a_beat(job_id)
        studio.wait_for_a_beat(job_id)

    studio.encode(scribe=Scribe(before=cancel))
    assert studio.look(job_id).status == "canceled"
    assert studio.storage.pictures() == []


def test_a_wish_to_cancel_after_the_embedding_is_stored_is_not_overlooked(studio: Studio, upkeep: Upkeep) -> None:
    job_id = studio.submit(stage=Stage.ENCODE)
    studio.storage.after_put = lambda _key: studio.cancel(job_id)
    studio.encode(progress_interval_s=60)
    assert studio.look(job_id).status == "canceled"
    assert studio.bell.rung == []
    assert studio.ended.is_set()
    upkeep.tick()
    assert studio.storage.pictures() == []


def test_an_encoder_that_has_no_time_left_hands_the_job_back_uncounted(studio: Studio) -> None:
    job_id = studio.submit(stage=Stage.ENCODE)
    encoder, shutdown = studio.encoder(grace_s=0, scribe=Scribe(before=lambda _request: shutdown.begin()))
    encoder.drain()
    encoder.finish()
    job = studio.look(job_id)
    assert (job.status, job.stage, job.attempts_left) == ("queued", "encode", 3)


def test_an_encoder_that_lost_its_lease_takes_its_embedding_away(studio: Studio) -> None:
    """Nobody else would, had the job ended and been cleared away meanwhile."""
    job_id = studio.submit(stage=Stage.ENCODE)
    studio.storage.after_put = lambda _key: studio.lose(job_id)
    studio.encode()
    assert studio.look(job_id).worker == "worker-2"
    assert studio.storage.pictures() == []


def test_what_an_encoder_stored_before_it_was_killed_goes_when_the_job_has_ended(
    studio: Studio, upkeep: Upkeep
) -> None:
    """Also where the job is canceled in the queue, by a process that knows nothing of embeddings."""
    killed, canceled = [studio.submit(stage=Stage.ENCODE) for _ in range(2)]
    for job_id in (killed, canceled):
        with studio.database.write() as transaction:
            job = lifecycle.claim(transaction, "encoder-9", -1, (Stage.ENCODE,))
        assert job is not None
        studio.storage.put(f"jobs/{job_id}/embedding-1.safetensors", b"and then it was killed", "")
    upkeep.tick()
    assert len(studio.storage.pictures()) == 2, "both wait to be encoded again"
    studio.cancel(canceled)
    upkeep.tick()
    assert studio.storage.pictures() == [f"jobs/{killed}/embedding-1.safetensors"]
    studio.encode()
    studio.work(**PAINTS_ONLY)
    upkeep.tick()
    assert (studio.look(killed).status, studio.storage.pictures()) == ("succeeded", [f"jobs/{killed}/3-0.png"])


def test_embeddings_that_cannot_be_deleted_now_are_deleted_later(
    studio: Studio, upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_keys: object) -> None:
        raise StorageError("the store is down")

    job_id = studio.submit(stage=Stage.ENCODE)
    studio.encode()
    studio.cancel(job_id)
    with monkeypatch.context() as patched:
        patched.setattr(studio.storage, "delete", refuse)
        upkeep.tick()
    assert studio.look(job_id).embedding_attempt == 1
    upkeep.tick()
    assert (studio.look(job_id).embedding_attempt, studio.storage.pictures()) == (None, [])


def test_a_job_retried_after_its_embedding_was_cleared_begins_anew(studio: Studio, upkeep: Upkeep) -> None:
    job_id = studio.submit(stage=Stage.ENCODE)
    studio.encode()
    studio.cancel(job_id)
    upkeep.tick()
    with studio.database.write() as transaction:
        lifecycle.retry(transaction, job_id, 3, Stage.ENCODE)
    studio.encode()
    studio.work(**PAINTS_ONLY)
    assert studio.look(job_id).status == "succeeded"


def test_a_store_that_is_down_for_a_while_costs_an_encoder_no_attempt(studio: Studio) -> None:
    job_id = studio.submit(stage=Stage.ENCODE)
    studio.storage.is_down = True
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(studio.encode)
        wait_until(lambda: studio.storage.refused > 0)
        studio.storage.is_down = False
        assert working.result() == 1
    assert (studio.look(job_id).stage, studio.look(job_id).attempt) == ("generate", 1)
