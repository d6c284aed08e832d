"""Prompts that one worker encodes and another generates images from: the stored embedding and its deletion."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.integration.worker.conftest import Environment
from tests.integration.worker.stand_in_pipeline import StandInEncoder
from tests.waiting import wait_until
from worker.maintenance.scheduler import Maintenance
from zcore.errors import InvalidRequest, StorageError
from zcore.image_files.writing import read_parameters
from zcore.jobs import claims, lifecycle, queries
from zcore.jobs.models import Event
from zcore.request import GenerationRequest
from zcore.stages import Stage

GENERATE_ONLY = {"stages": (Stage.GENERATE,)}


def test_a_split_job_is_encoded_once_and_generated_once_from_the_embedding(environment: Environment) -> None:
    job_id = environment.submit(stage=Stage.ENCODE, prompt="a heron")
    assert environment.generate_due(**GENERATE_ONLY) == 0, "its prompt is not encoded yet"
    assert environment.encode_due() == 1
    assert environment.storage.keys() == [f"jobs/{job_id}/embedding-1.safetensors"]
    assert environment.notifications.stages == [Stage.GENERATE]
    assert environment.generate_due(**GENERATE_ONLY) == 1
    assert (environment.prompt_encoder.encoded, environment.pipeline.embedded_prompts) == (["a heron"], ["a heron"])
    job = environment.job(job_id)
    assert (job.status, job.attempt) == ("succeeded", 2)
    assert environment.events(job_id) == ["queued", "claimed", "encoded", "claimed", "succeeded"]


def test_the_metrics_and_engine_of_both_workers_are_recorded_with_the_image(environment: Environment) -> None:
    job_id = environment.submit(stage=Stage.ENCODE)
    environment.encode_due()
    with environment.database.write() as transaction:
        encoded = transaction.session.query(Event).filter_by(job_id=job_id, type="encoded").one()
        encoded.detail = {**encoded.detail, "metrics": {"queue_ms": 1000, "encode_ms": 200, "upload_ms": 30}}
    environment.generate_due(**GENERATE_ONLY)
    job = environment.job(job_id)
    assert job.metrics["encode_ms"] == 200
    assert job.metrics["queue_ms"] >= 1000
    assert job.metrics["upload_ms"] >= 30
    parts = ("queue_ms", "encode_ms", "denoise_ms", "decode_ms", "upload_ms")
    assert job.metrics["total_ms"] == sum(job.metrics[name] for name in parts)
    made_by = {"engine": "stand-in pipeline", "encoder": "stand-in encoder"}
    assert job.engine == made_by
    parameters = read_parameters(environment.storage.get(job.outputs[0].key))
    assert parameters is not None
    assert parameters.made_by == made_by


def test_a_worker_of_both_stages_processes_a_whole_job_without_storing_the_embedding(environment: Environment) -> None:
    job_id = environment.submit(stage=Stage.ENCODE)
    assert environment.generate_due() == 1
    assert (environment.job(job_id).status, environment.pipeline.embedded_prompts) == ("succeeded", [])
    assert environment.storage.keys() == [f"jobs/{job_id}/1-0.png"]


def test_a_worker_of_both_stages_uses_an_embedding_that_another_has_stored(environment: Environment) -> None:
    environment.submit(stage=Stage.ENCODE, prompt="a heron")
    environment.encode_due()
    environment.generate_due()
    assert environment.pipeline.embedded_prompts == ["a heron"]


@pytest.mark.parametrize("fault", ["deleted", "damaged", "of another model"])
def test_an_unusable_embedding_is_encoded_again(environment: Environment, maintenance: Maintenance, fault: str) -> None:
    job_id = environment.submit(stage=Stage.ENCODE)
    environment.encode_due(encoder=StandInEncoder(model="another model" if fault == "of another model" else "a model"))
    key = f"jobs/{job_id}/embedding-1.safetensors"
    if fault == "deleted":
        environment.storage.delete([key])
    elif fault == "damaged":
        environment.storage.put(key, b"damaged", "application/octet-stream")
    environment.notifications.stages.clear()
    environment.generate_due(**GENERATE_ONLY)
    job = environment.job(job_id)
    assert (job.status, job.stage, job.attempts_left) == ("queued", "encode", 2)
    assert environment.notifications.stages == [Stage.ENCODE]
    environment.encode_due()
    environment.generate_due(**GENERATE_ONLY)
    assert environment.job(job_id).status == "succeeded"
    environment.delete_leftovers()
    assert environment.storage.keys() == [f"jobs/{job_id}/4-0.png"]


def test_a_job_whose_encoder_has_another_model_fails_when_its_attempts_are_used_up(environment: Environment) -> None:
    job_id = environment.submit(stage=Stage.ENCODE, max_attempts=2)
    mismatched = StandInEncoder(model="another model")
    for _ in range(5):
        environment.encode_due(encoder=mismatched)
        environment.generate_due(**GENERATE_ONLY)
    job = environment.job(job_id)
    assert (job.status, job.error_code, len(mismatched.encoded)) == ("failed", "embedding_lost", 2)
    assert "another model" in (job.error_message or "")


@pytest.mark.parametrize("fault", ["deleted", "of another model"])
def test_a_worker_of_both_stages_encodes_the_prompt_if_the_embedding_is_unusable(
    environment: Environment, fault: str
) -> None:
    job_id = environment.submit(stage=Stage.ENCODE)
    environment.encode_due(encoder=StandInEncoder(model="another model"))
    if fault == "deleted":
        environment.storage.delete([f"jobs/{job_id}/embedding-1.safetensors"])
    environment.generate_due()
    job = environment.job(job_id)
    assert (job.status, job.attempt, environment.pipeline.embedded_prompts) == ("succeeded", 2, [])
    assert job.engine == {"engine": "stand-in pipeline"}


def test_a_worker_of_generate_alone_sends_a_whole_job_to_be_encoded(environment: Environment) -> None:
    job_id = environment.submit(max_attempts=1)
    environment.generate_due(**GENERATE_ONLY)
    assert environment.notifications.stages == [Stage.ENCODE]
    environment.encode_due()
    environment.generate_due(**GENERATE_ONLY)
    assert environment.job(job_id).status == "succeeded"
    assert environment.events(job_id) == [
        "queued", "claimed", "returned_to_encode", "claimed", "encoded", "claimed", "succeeded",
    ]  # fmt: skip


def test_a_worker_of_generate_alone_fetches_no_inputs_for_a_prompt_that_is_not_encoded(
    environment: Environment,
) -> None:
    job_id = environment.submit(image="http://127.0.0.1:1/unreachable.png")
    environment.generate_due(**GENERATE_ONLY)
    assert environment.events(job_id) == ["queued", "claimed", "returned_to_encode"]


def test_an_error_that_is_not_retryable_fails_the_job_during_encoding(environment: Environment) -> None:
    def refuse(_request: GenerationRequest) -> None:
        raise InvalidRequest.field("template", "does not exist")

    job_id = environment.submit(stage=Stage.ENCODE)
    environment.encode_due(encoder=StandInEncoder(before=refuse))
    assert (environment.job(job_id).status, environment.job(job_id).error_code) == ("failed", "invalid_request")


def test_a_cancellation_request_during_encoding_ends_the_job(
    environment: Environment, maintenance: Maintenance
) -> None:
    job_id = environment.submit(stage=Stage.ENCODE)

    def cancel(_request: GenerationRequest) -> None:
        environment.cancel(job_id)
        # The encoder does not come back in time, so the heartbeat ends the job.
        wait_until(lambda: environment.job(job_id).status == "canceled")

    environment.encode_due(encoder=StandInEncoder(before=cancel))
    assert environment.job(job_id).status == "canceled"
    assert environment.storage.keys() == []


def test_a_cancellation_request_after_the_embedding_is_stored_ends_the_job(
    environment: Environment, maintenance: Maintenance
) -> None:
    job_id = environment.submit(stage=Stage.ENCODE)
    environment.storage.after_put = lambda _key: environment.cancel(job_id)
    environment.encode_due(progress_interval_s=60)
    assert environment.job(job_id).status == "canceled"
    assert environment.notifications.stages == []
    assert environment.ended.is_set()
    environment.delete_leftovers()
    assert environment.storage.keys() == []


def test_a_prompt_worker_without_grace_time_hands_its_job_back_without_counting_the_attempt(
    environment: Environment,
) -> None:
    job_id = environment.submit(stage=Stage.ENCODE)
    worker, shutdown = environment.prompt_worker(
        grace_s=0, encoder=StandInEncoder(before=lambda _request: shutdown.begin())
    )
    worker.drain()
    worker.finish()
    job = environment.job(job_id)
    assert (job.status, job.stage, job.attempts_left) == ("queued", "encode", 3)


def test_an_embedding_stored_after_the_lease_was_lost_is_deleted_when_the_job_has_ended(
    environment: Environment,
) -> None:
    job_id = environment.submit(stage=Stage.ENCODE)
    environment.storage.after_put = lambda _key: environment.lose_lease(job_id)
    environment.encode_due()
    assert environment.job(job_id).worker == "worker-2"
    assert environment.storage.keys() == [f"jobs/{job_id}/embedding-1.safetensors"]
    environment.cancel(job_id)
    with environment.database.write() as transaction:
        lifecycle.acknowledge_cancel(transaction, claims.lease_of(queries.get(transaction, job_id)))
    environment.delete_leftovers()
    assert environment.storage.keys() == []


def test_an_embedding_stored_before_a_kill_is_deleted_when_the_job_has_ended(
    environment: Environment, maintenance: Maintenance
) -> None:
    """This includes a job canceled in the queue by a process that does not handle embeddings."""
    killed, canceled = [environment.submit(stage=Stage.ENCODE) for _ in range(2)]
    for job_id in (killed, canceled):
        with environment.database.write() as transaction:
            job = claims.claim(transaction, "encoder-9", -1, (Stage.ENCODE,))
        assert job is not None
        environment.storage.put(f"jobs/{job_id}/embedding-1.safetensors", b"stored before the kill", "")
    maintenance.run_once()
    environment.delete_leftovers()
    assert len(environment.storage.keys()) == 2, "both jobs will be encoded again"
    environment.cancel(canceled)
    environment.delete_leftovers()
    assert environment.storage.keys() == [f"jobs/{killed}/embedding-1.safetensors"]
    environment.encode_due()
    environment.generate_due(**GENERATE_ONLY)
    environment.delete_leftovers()
    assert (environment.job(killed).status, environment.storage.keys()) == ("succeeded", [f"jobs/{killed}/3-0.png"])


def test_leftovers_are_deleted_after_a_storage_outage(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_keys: object) -> None:
        raise StorageError("the storage is down")

    job_id = environment.submit(stage=Stage.ENCODE)
    environment.encode_due()
    environment.cancel(job_id)
    with monkeypatch.context() as patched:
        patched.setattr(environment.storage, "delete", refuse)
        environment.delete_leftovers()
    assert environment.storage.keys() == [f"jobs/{job_id}/embedding-1.safetensors"]
    environment.delete_leftovers()
    assert environment.storage.keys() == []


def test_a_job_retried_after_its_embedding_was_deleted_is_encoded_again(environment: Environment) -> None:
    job_id = environment.submit(stage=Stage.ENCODE)
    environment.encode_due()
    environment.cancel(job_id)
    environment.delete_leftovers()
    with environment.database.write() as transaction:
        lifecycle.retry(transaction, job_id, 3, Stage.ENCODE)
    environment.encode_due()
    environment.generate_due(**GENERATE_ONLY)
    assert environment.job(job_id).status == "succeeded"


def test_a_short_storage_outage_costs_a_prompt_worker_no_attempt(environment: Environment) -> None:
    job_id = environment.submit(stage=Stage.ENCODE)
    environment.storage.is_down = True
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(environment.encode_due)
        wait_until(lambda: environment.storage.refused)
        environment.storage.is_down = False
        assert working.result() == 1
    assert (environment.job(job_id).stage, environment.job(job_id).attempt) == ("generate", 1)
