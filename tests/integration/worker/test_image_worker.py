"""Every way from the claim of a job to its end, on a real database, with a stand-in for the model."""

import hashlib
import io
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from PIL import Image
from sqlalchemy import make_url

from tests.integration.broker.tcp_proxy import proxy_to
from tests.integration.worker.conftest import Environment, open_storage
from tests.integration.worker.stand_in_pipeline import BeforeStep, FallbackStep, StandInPipeline
from tests.services.postgres import Postgres
from tests.waiting import wait_until
from worker.presence import Presence
from zcore.errors import InvalidRequest, OutOfMemory, SigningError
from zcore.image_files.writing import Marks, read_parameters
from zcore.jobs import claims, lifecycle, queries, recovery, workers
from zcore.jobs.database import Database
from zcore.request import GenerationRequest
from zcore.stages import Stage
from zcore.storage_keys import PROBE_KEY


def test_one_drain_generates_every_due_job_in_order_of_priority(environment: Environment) -> None:
    for priority in (0, 5, -5, 5):
        environment.submit(prompt=f"priority {priority}", priority=priority)
    assert environment.generate_due() == 4
    assert [request.prompt for request in environment.pipeline.requests] == [
        "priority 5",
        "priority 5",
        "priority 0",
        "priority -5",
    ]
    assert environment.generate_due() == 0


def test_the_outputs_of_a_succeeded_job_describe_the_objects_in_storage(environment: Environment) -> None:
    job_id = environment.submit(n=2, width=128, seed=7)
    environment.generate_due()
    job = environment.job(job_id)
    assert job.status == "succeeded"
    assert [(o.position, o.key, o.width, o.height, o.seed) for o in job.outputs] == [
        (0, f"jobs/{job_id}/1-0.png", 128, 64, 7), (1, f"jobs/{job_id}/1-1.png", 128, 64, 8),
    ]  # fmt: skip
    for output in job.outputs:
        content = environment.storage.get(output.key)
        assert (output.bytes, output.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        parameters = read_parameters(content)
        assert parameters is not None
        assert parameters.request.seed == output.seed
    assert job.engine == {"engine": "stand-in pipeline"}
    assert set(job.metrics) == {
        "queue_ms", "encode_ms", "denoise_ms", "decode_ms", "peak_vram_mb", "upload_ms", "total_ms",
    }  # fmt: skip
    assert environment.ended.is_set(), "webhook delivery is notified"


@pytest.mark.parametrize("kind", ["image_worker", "prompt_worker"])
def test_a_worker_reports_the_hits_of_its_embedding_cache(environment: Environment, kind: str) -> None:
    worker, shutdown = getattr(environment, kind)()
    presence = Presence(environment.database, "worker-1", "demo", "cpu", tuple(Stage), shutdown, worker.cache_counts)

    def listed() -> list[tuple[int, int]]:
        with environment.database.read() as transaction:
            return [(one.embedding_cache_hits, one.embedding_cache_misses) for one in workers.present(transaction)]

    presence.start()
    assert wait_until(listed) == [(3, 1)]
    presence.stop()
    assert listed() == []


@pytest.mark.parametrize("file_format", ["png", "jpeg", "webp", "avif"])
def test_an_image_is_stored_in_the_requested_format(environment: Environment, file_format: str) -> None:
    job_id = environment.submit(format=file_format)
    environment.generate_due()
    (output,) = environment.job(job_id).outputs
    assert (output.format, output.key) == (file_format, f"jobs/{job_id}/1-0.{file_format}")
    with Image.open(io.BytesIO(environment.storage.get(output.key))) as image:
        assert image.format == file_format.upper()


def test_progress_is_written_to_the_row_during_generation(environment: Environment) -> None:
    job_id = environment.submit(steps=4)

    def wait_for_progress(_request: GenerationRequest, step: int) -> None:
        if step:
            wait_until(lambda: (job := environment.job(job_id)).progress_step == step - 1 and job.progress_phase)

    environment.pipeline.before_step = wait_for_progress
    environment.generate_due()
    assert environment.job(job_id).status == "succeeded"


def cancel_at(environment: Environment, job_id: UUID, cancel_step: int) -> BeforeStep:
    """Return a callback that cancels the job at a step of the prompt `a fox`, and takes a while for each later step."""

    def before_step(request: GenerationRequest, step: int) -> None:
        if request.prompt == "a fox" and step == cancel_step:
            environment.cancel(job_id)
        if request.prompt == "a fox" and step >= cancel_step:
            threading.Event().wait(0.05)

    return before_step


def test_a_cancellation_request_stops_the_generation(environment: Environment) -> None:
    job_id = environment.submit(steps=50, n=8)
    environment.pipeline.before_step = cancel_at(environment, job_id, 3)
    environment.generate_due()
    assert len(environment.pipeline.steps) < 200
    assert environment.job(job_id).status == "canceled"
    assert environment.storage.keys() == []


def test_the_next_job_is_generated_after_a_cancellation(environment: Environment) -> None:
    first, second = environment.submit(steps=50, n=8), environment.submit(prompt="next")
    environment.pipeline.before_step = cancel_at(environment, first, 1)
    environment.generate_due()
    assert (environment.job(first).status, environment.job(second).status) == ("canceled", "succeeded")


def test_a_worker_that_shuts_down_finishes_its_current_job_and_claims_no_other(environment: Environment) -> None:
    first, second = environment.submit(), environment.submit()
    worker, shutdown = environment.image_worker(grace_s=60)
    environment.pipeline.before_step = lambda _request, _step: shutdown.begin()
    assert worker.drain() == 1
    worker.finish()
    assert (environment.job(first).status, environment.job(second).status) == ("succeeded", "queued")


def test_a_worker_without_grace_time_hands_its_job_back_without_counting_the_attempt(environment: Environment) -> None:
    job_id = environment.submit()
    worker, shutdown = environment.image_worker(grace_s=0)
    environment.pipeline.before_step = lambda _request, step: shutdown.begin() if step == 2 else None
    worker.drain()
    worker.finish()
    job = environment.job(job_id)
    assert (job.status, job.attempts_left, job.progress_phase) == ("queued", 3, None)
    assert environment.events(job_id) == ["queued", "claimed", "released"]
    assert environment.pipeline.steps == [0, 1, 2]
    environment.pipeline.before_step = lambda _request, _step: None
    assert environment.generate_due() == 1
    assert environment.job(job_id).status == "succeeded"


def test_a_lease_lost_during_generation_stops_it_and_nothing_is_written(environment: Environment) -> None:
    job_id = environment.submit(steps=50)

    def lose_lease(_request: GenerationRequest, step: int) -> None:
        if step == 2:
            environment.lose_lease(job_id)
        if step > 2:
            threading.Event().wait(0.02)

    environment.pipeline.before_step = lose_lease
    environment.generate_due()
    assert len(environment.pipeline.steps) < 50
    assert_held_by_the_other_worker(environment, job_id)


def test_a_lease_lost_during_the_upload_writes_nothing(environment: Environment) -> None:
    job_id = environment.submit(n=2)
    environment.storage.after_put = lambda key: environment.lose_lease(job_id) if key.endswith("1-1.png") else None
    environment.generate_due()
    assert_held_by_the_other_worker(environment, job_id)


def assert_held_by_the_other_worker(environment: Environment, job_id: UUID) -> None:
    """Assert that the first worker left nothing behind but what is deleted when the job has ended."""
    job = environment.job(job_id)
    assert (job.status, job.worker, job.attempt, job.outputs) == ("running", "worker-2", 2, [])
    assert environment.events(job_id) == ["queued", "claimed", "rescued", "claimed"]
    environment.cancel(job_id)
    with environment.database.write() as transaction:
        lifecycle.acknowledge_cancel(transaction, claims.lease_of(job))
    environment.delete_leftovers()
    assert environment.storage.keys() == []


def is_known_to_be_away(environment: Environment) -> bool:
    """Return whether a worker has probed the storage more than once."""
    return environment.storage.refused.count(PROBE_KEY) > 1


def test_images_wait_in_memory_while_the_storage_is_away_and_no_other_job_is_claimed(environment: Environment) -> None:
    first = environment.submit()
    environment.storage.is_down = True
    worker, _ = environment.image_worker(upload_retry_s=0.0)
    assert worker.drain() == 1
    wait_until(lambda: is_known_to_be_away(environment))
    second = environment.submit()
    assert worker.drain() == 0
    assert [environment.job(job_id).status for job_id in (first, second)] == ["running", "queued"]
    environment.storage.is_down = False
    assert environment.storage_returned.wait(30), "the worker notifies itself"
    assert worker.drain() == 1
    worker.finish()
    assert [environment.job(job_id).status for job_id in (first, second)] == ["succeeded", "succeeded"]
    assert [environment.job(job_id).attempt for job_id in (first, second)] == [1, 1]
    assert len(environment.pipeline.requests) == 2


def test_generation_waits_when_the_upload_backlog_is_full(environment: Environment) -> None:
    """The backlog is four by default: the fifth job is generated and then waits, and the sixth is not started."""
    for _ in range(8):
        environment.submit()
    environment.storage.refuses = lambda key: key != PROBE_KEY
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(environment.generate_due, upload_retry_s=3600)
        wait_until(lambda: len(environment.pipeline.requests) == 5 and len(environment.storage.refused) >= 8)
        assert len(environment.pipeline.requests) == 5
        environment.storage.refuses = lambda _key: False
        assert working.result() == 8


def test_a_job_that_lost_a_worker_runs_with_no_other_job_beside_it(environment: Environment) -> None:
    """An upload lasts until the next job's generation begins, or for so long that it must be waiting for the upload."""
    suspect = environment.submit(prompt="suspect")
    environment.lose_worker(suspect)
    before, after = environment.submit(prompt="before", priority=1), environment.submit(prompt="after", priority=-1)
    begun = {"suspect": threading.Event(), "after": threading.Event()}
    beside: dict[str, int] = {}

    def note_the_others(request: GenerationRequest, step: int) -> None:
        if step == 0:
            states = [environment.job(job_id).status for job_id in (before, suspect, after)]
            beside[request.prompt] = states.count("running") - 1
            begun.get(request.prompt, threading.Event()).set()

    def wait_for_the_next(key: str) -> None:
        if str(after) not in key:
            begun["suspect" if str(before) in key else "after"].wait(0.5)

    environment.pipeline.before_step = note_the_others
    environment.storage.after_put = wait_for_the_next
    assert environment.generate_due() == 3
    assert beside == {"before": 0, "suspect": 0, "after": 0}


def test_a_refused_object_ends_the_attempt_without_charging_it_and_leaves_none_behind(environment: Environment) -> None:
    """The storage is there: it takes other objects."""
    job_id = environment.submit(n=3, max_attempts=1)
    environment.storage.refuses = lambda key: key.endswith("1-2.png")
    environment.generate_due(upload_retry_s=0, retry_delay_s=3600)
    job = environment.job(job_id)
    assert (job.status, job.attempts_left) == ("queued", 1)
    assert environment.events(job_id) == ["queued", "claimed", "retry_scheduled"]
    environment.cancel(job_id)
    environment.delete_leftovers()
    assert environment.storage.keys() == []


def test_a_cancellation_request_ends_the_wait_for_a_storage_that_is_down(environment: Environment) -> None:
    job_id = environment.submit()
    environment.storage.is_down = True
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(environment.generate_due, upload_retry_s=3600)
        wait_until(lambda: environment.storage.refused)
        environment.cancel(job_id)
        try:
            wait_until(lambda: environment.job(job_id).status != "running", timeout_s=15)
        finally:
            environment.storage.is_down = False
        working.result()
    assert environment.job(job_id).status == "canceled"


def test_a_worker_that_shuts_down_during_a_storage_outage_hands_its_job_back(environment: Environment) -> None:
    job_id = environment.submit()
    environment.storage.is_down = True
    worker, shutdown = environment.image_worker(grace_s=1.0)
    worker.drain()
    wait_until(lambda: environment.storage.refused)
    shutdown.begin()
    worker.finish()
    job = environment.job(job_id)
    assert (job.status, job.attempts_left) == ("queued", 3)
    assert environment.events(job_id)[-1] == "released"
    assert len(environment.storage.refused) < 20, "it waits between retries during shutdown too"


def test_an_unexpected_error_is_retried_and_its_text_is_not_shown_to_callers(environment: Environment) -> None:
    def crash(_request: GenerationRequest, _step: int) -> None:
        raise RuntimeError("the password is swordfish")

    job_id = environment.submit(max_attempts=2)
    environment.pipeline.before_step = crash
    environment.generate_due()
    job = environment.job(job_id)
    assert (job.status, job.attempt, job.error_code) == ("failed", 2, "internal_error")
    assert "swordfish" not in (job.error_message or "")


def test_a_worker_stops_after_three_consecutive_crashes(environment: Environment) -> None:
    def crash(_request: GenerationRequest, _step: int) -> None:
        raise RuntimeError("something is wrong with this process")

    ids = [environment.submit(max_attempts=1) for _ in range(6)]
    environment.pipeline.before_step = crash
    assert environment.generate_due() == 3
    assert environment.broken.is_set()
    assert [environment.job(job_id).status for job_id in ids] == ["failed"] * 3 + ["queued"] * 3


def test_the_retries_of_one_job_do_not_stop_a_worker(environment: Environment) -> None:
    def crash(request: GenerationRequest, _step: int) -> None:
        if request.seed == 1:
            raise RuntimeError("this job only")

    hostile = environment.submit(max_attempts=5, seed=1)
    environment.pipeline.before_step = crash
    assert environment.generate_due() == 5
    assert environment.job(hostile).status == "failed"
    assert not environment.broken.is_set()
    other = environment.submit(seed=2)
    environment.generate_due()
    assert environment.job(other).status == "succeeded"


def test_a_message_from_a_foreign_file_can_be_stored_and_is_bounded(environment: Environment) -> None:
    def refuse(_request: GenerationRequest, _step: int) -> None:
        raise InvalidRequest.field("loras", "has unsupported keys: \0\x1b[31m" + "k" * 2_000_000)

    job_id = environment.submit()
    environment.pipeline.before_step = refuse
    environment.generate_due()
    job = environment.job(job_id)
    assert (job.status, job.attempt, job.error_code) == ("failed", 1, "invalid_request")
    assert str(job.error_message).startswith(r"loras: has unsupported keys: \u0000\u001b[31mkkk")
    assert len(str(job.error_message)) <= 4000


def test_a_worker_stops_at_once_when_its_gpu_has_failed(environment: Environment) -> None:
    def crash(_request: GenerationRequest, _step: int) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    environment.submit()
    environment.submit()
    environment.pipeline.before_step = crash
    assert environment.generate_due() == 1
    assert environment.broken.is_set()


def test_a_worker_continues_after_crashes_that_are_not_consecutive(environment: Environment) -> None:
    def crash(request: GenerationRequest, _step: int) -> None:
        if request.seed % 2:
            raise RuntimeError("this job only")

    for seed in range(8):
        environment.submit(max_attempts=1, seed=seed)
    environment.pipeline.before_step = crash
    assert environment.generate_due() == 8
    assert not environment.broken.is_set()


def test_fallback_steps_are_in_the_timeline(environment: Environment) -> None:
    steps = [
        FallbackStep("batch_split", "2 images are generated at once instead of 4"),
        FallbackStep("vae_tiled", "tiles"),
    ]

    def overflow(request: GenerationRequest, step: int) -> None:
        if request.prompt == "too large" and step == 3:
            raise OutOfMemory("64x64 does not fit")

    pipeline = StandInPipeline(overflow, fallback_steps={2: list(steps)})
    job_id = environment.submit(prompt="too large", steps=5)
    environment.generate_due(pipeline=pipeline)
    assert environment.job(job_id).error_code == "gpu_out_of_memory"
    with environment.database.read() as transaction:
        events = queries.timeline(transaction, job_id).events
    assert [event.type for event in events] == ["queued", "claimed", "oom_fallback", "oom_fallback", "failed"]
    assert [event.detail for event in events[2:4]] == [
        {"step": step.kind, "detail": step.description} for step in steps
    ]
    pipeline.fallback_steps = {0: [steps[0], FallbackStep("vae_float32", "float32", event="precision_fallback")]}
    small = environment.submit(prompt="small")
    environment.generate_due(pipeline=pipeline)
    assert environment.job(small).status == "succeeded"
    with environment.database.read() as transaction:
        events = queries.timeline(transaction, small).events
    assert [event.type for event in events] == ["queued", "claimed", "oom_fallback", "precision_fallback", "succeeded"]


def test_a_worker_without_its_lease_writes_no_events(environment: Environment) -> None:
    job_id = environment.submit()
    with environment.database.write() as transaction:
        claimed = claims.claim(transaction, "first", lease_s=30)
        assert claimed is not None
        lost = claims.lease_of(claimed)
    with environment.database.write() as transaction:
        assert claims.add_event(transaction, lost, "oom_fallback", {"step": "vae_tiled", "detail": "tiles"}) is True
        lifecycle.release(transaction, lost)
    with environment.database.write() as transaction:
        assert claims.add_event(transaction, lost, "oom_fallback", {"step": "vae_tiled", "detail": "tiles"}) is False
    with environment.database.read() as transaction:
        events = queries.timeline(transaction, job_id).events
    assert [event.type for event in events] == ["queued", "claimed", "oom_fallback", "released"]


def test_an_error_that_is_not_retryable_fails_the_job_at_once(environment: Environment) -> None:
    def refuse(_request: GenerationRequest, _step: int) -> None:
        raise InvalidRequest.field("width", "is larger than this checkpoint supports")

    job_id = environment.submit()
    environment.pipeline.before_step = refuse
    environment.generate_due()
    job = environment.job(job_id)
    assert (job.status, job.attempt, job.error_code) == ("failed", 1, "invalid_request")
    assert job.error_message == "width: is larger than this checkpoint supports"


def test_the_images_of_lost_attempts_are_deleted_after_another_succeeded(environment: Environment) -> None:
    job_id = environment.submit()
    with environment.database.write() as transaction:
        claimed = claims.claim(transaction, "worker-0", 60)
        assert claimed is not None
        lifecycle.release(transaction, claims.lease_of(claimed))
    environment.storage.put(f"jobs/{job_id}/1-0.png", b"from a lost attempt", "image/png")
    environment.generate_due()
    environment.delete_leftovers()
    assert environment.storage.keys() == [f"jobs/{job_id}/2-0.png"]


def test_two_workers_generate_each_job_once(environment: Environment) -> None:
    jobs = [environment.submit(prompt=f"prompt {index}") for index in range(20)]
    pipelines = [StandInPipeline(), StandInPipeline()]
    with ThreadPoolExecutor(2) as pool:
        claimed = list(
            pool.map(lambda i: environment.generate_due(name=f"worker-{i}", pipeline=pipelines[i]), range(2))
        )
    assert sum(claimed) == 20
    prompts = [request.prompt for pipeline in pipelines for request in pipeline.requests]
    assert sorted(prompts) == sorted(f"prompt {index}" for index in range(20))
    assert {environment.job(job).status for job in jobs} == {"succeeded"}
    assert {environment.job(job).attempt for job in jobs} == {1}


def test_a_database_outage_after_the_upload_loses_no_job(postgres: Postgres, database_url: str, tmp_path: Path) -> None:
    """The end is not written; after the lease expires the job runs again, and its first images are deleted."""
    assert postgres.url.port is not None
    storage = open_storage(tmp_path)
    with proxy_to(postgres.url.port) as cable, closing(Database(database_url)) as direct:
        remote = make_url(database_url).set(port=cable.port).render_as_string(hide_password=False)
        with closing(Database(remote)) as database:
            environment = Environment(database, storage)
            job_id = environment.submit()
            storage.after_put = lambda _key: cable.cut()
            environment.generate_due(lease_s=1.0)
            cable.plug()
            storage.after_put = lambda _key: None
            assert environment.job(job_id).status == "running"
            assert storage.keys() == [f"jobs/{job_id}/1-0.png"]

            def rescued() -> bool:
                with direct.write() as transaction:
                    return bool(recovery.rescue(transaction))

            wait_until(rescued)
            environment.generate_due()
            assert (environment.job(job_id).status, environment.job(job_id).attempt) == ("succeeded", 2)
            environment.delete_leftovers()
            assert storage.keys() == [f"jobs/{job_id}/2-0.png"]


@pytest.mark.timeout(60)
def test_a_database_outage_longer_than_the_lease_stops_the_generation(
    postgres: Postgres, database_url: str, tmp_path: Path
) -> None:
    """By then another worker may have claimed the job."""
    assert postgres.url.port is not None
    storage = open_storage(tmp_path)
    with proxy_to(postgres.url.port) as cable:
        remote = make_url(database_url).set(port=cable.port).render_as_string(hide_password=False)
        with closing(Database(remote)) as database:
            environment = Environment(database, storage)
            environment.submit(steps=50)

            def go_silent(_request: GenerationRequest, step: int) -> None:
                if step == 1:
                    cable.cut()
                if step > 1:
                    threading.Event().wait(0.2)

            environment.pipeline.before_step = go_silent
            worker, _ = environment.image_worker(lease_s=1.0)
            worker.drain()
            worker.finish()
            assert len(environment.pipeline.steps) < 50


class UnreliableSigner:
    """Stand-in for `CredentialSigner` that fails for the first files."""

    def __init__(self, failures: float) -> None:
        self.failures = failures

    def sign(self, content: bytes, *_: Any) -> bytes:
        if self.failures > 0:
            self.failures -= 1
            raise SigningError("the image could not be signed: no entropy")
        return content + b"signed"


def test_an_image_that_cannot_be_signed_is_not_delivered_and_its_job_is_retried(environment: Environment) -> None:
    passing = environment.submit()
    environment.generate_due(marks=Marks(signer=UnreliableSigner(1)))
    environment.generate_due(marks=Marks(signer=UnreliableSigner(0)))
    job = environment.job(passing)
    assert (job.status, job.attempt) == ("succeeded", 2)
    (output,) = job.outputs
    content = environment.storage.get(output.key)
    assert content.endswith(b"signed")
    assert (output.sha256, output.bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    lasting = environment.submit(max_attempts=1)
    environment.generate_due(marks=Marks(signer=UnreliableSigner(math.inf)))
    job = environment.job(lasting)
    assert (job.status, job.error_code, job.outputs) == ("failed", "signing_failed", [])
    assert str(lasting) not in " ".join(environment.storage.keys())
