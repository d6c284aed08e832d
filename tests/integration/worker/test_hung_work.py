"""Work that does not advance ends: the job continues elsewhere, and a thread that does not come back is left."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from uuid import UUID

import pytest

from tests.integration.worker.conftest import Environment
from tests.integration.worker.stand_in_pipeline import StandInEncoder, StandInPipeline
from tests.waiting import wait_until
from worker.shutdown import Shutdown
from zcore.jobs import queries
from zcore.request import GenerationRequest
from zcore.stages import Stage

HANGING = "a job that hangs"


@pytest.fixture
def hanging() -> Iterator[threading.Event]:
    """What hanging work waits for; set at the end of the test."""
    event = threading.Event()
    yield event
    event.set()


def hang(environment: Environment, hanging: threading.Event) -> threading.Event:
    """Let the pipeline hang at the third step of jobs with the prompt `HANGING`. Returns what is set when it does."""
    hangs = threading.Event()

    def before_step(request: GenerationRequest, step: int) -> None:
        if request.prompt == HANGING and step == 2:
            hangs.set()
            hanging.wait(120)

    environment.pipeline.before_step = before_step
    return hangs


@contextmanager
def draining(environment: Environment, hanging: threading.Event, **changed: float) -> Iterator[Shutdown]:
    """Drain the queue in another thread, whose pipeline hangs until the block ends."""
    worker, shutdown = environment.image_worker(**changed)
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(worker.drain)
        try:
            yield shutdown
        finally:
            hanging.set()
            working.result()
            worker.finish()


def last_detail(environment: Environment, job_id: UUID) -> dict[str, str]:
    with environment.database.read() as transaction:
        return queries.timeline(transaction, job_id).events[-1].detail


def test_a_job_that_hangs_ends_as_stalled_its_process_is_left_and_another_worker_does_it(
    environment: Environment, hanging: threading.Event
) -> None:
    job_id = environment.submit(prompt=HANGING)
    hang(environment, hanging)
    with draining(environment, hanging, stall_floor_s=0.5):
        wait_until(lambda: environment.hung)
        assert environment.events(job_id) == ["queued", "claimed", "retry_scheduled"]
        assert last_detail(environment, job_id)["code"] == "stalled"
        assert environment.job(job_id).attempts_left == 2, "it may be the job's fault"
        assert environment.generate_due(name="worker-2", pipeline=StandInPipeline()) == 1
        assert environment.job(job_id).status == "succeeded"
    assert environment.hung[0] == "the phase `denoise` made no progress for 0 s"
    assert environment.job(job_id).worker == "worker-2", "the first worker can write nothing afterwards"


def test_a_job_that_always_hangs_fails(environment: Environment, hanging: threading.Event) -> None:
    job_id = environment.submit(prompt=HANGING, max_attempts=1)
    hang(environment, hanging)
    with draining(environment, hanging, stall_floor_s=0.5):
        wait_until(lambda: environment.job(job_id).status == "failed")
    job = environment.job(job_id)
    assert (job.error_code, job.error_retryable) == ("stalled", True)


def test_an_attempt_that_only_crawls_ends_at_its_deadline(environment: Environment) -> None:
    job_id = environment.submit(steps=50, n=8, max_attempts=1)
    environment.pipeline.before_step = lambda _request, _step: threading.Event().wait(0.05) and None
    environment.generate_due(attempt_deadline_s=1.0)
    assert environment.job(job_id).error_code == "stalled"
    assert len(environment.pipeline.steps) < 400
    assert not environment.hung, "it came back, so its process goes on"


def test_a_canceled_job_that_hangs_ends_and_its_process_stays_within_the_budget(
    environment: Environment, hanging: threading.Event
) -> None:
    """The thread may only be in a long step."""
    job_id = environment.submit(prompt=HANGING)
    hangs = hang(environment, hanging)
    with draining(environment, hanging):
        assert hangs.wait(30)
        environment.cancel(job_id)
        wait_until(lambda: environment.job(job_id).status == "canceled")
        assert not environment.hung
    assert environment.events(job_id) == ["queued", "claimed", "cancel_requested", "canceled"]
    assert environment.storage.keys() == []


def test_a_canceled_job_whose_thread_never_comes_back_takes_its_process_with_it(
    environment: Environment, hanging: threading.Event
) -> None:
    job_id = environment.submit(prompt=HANGING)
    hangs = hang(environment, hanging)
    with draining(environment, hanging, stall_floor_s=4.0):
        assert hangs.wait(30)
        environment.cancel(job_id)
        wait_until(lambda: environment.hung)
        assert environment.job(job_id).status == "canceled"


def test_a_worker_that_shuts_down_hands_back_a_job_that_hangs(
    environment: Environment, hanging: threading.Event
) -> None:
    job_id = environment.submit(prompt=HANGING)
    hangs = hang(environment, hanging)
    with draining(environment, hanging, grace_s=0.1) as shutdown:
        assert hangs.wait(30)
        shutdown.begin()
        wait_until(lambda: environment.job(job_id).status == "queued")
    assert environment.events(job_id) == ["queued", "claimed", "released"]
    assert environment.job(job_id).attempts_left == 3


def test_uploads_that_hang_are_handed_back_when_the_worker_shuts_down(
    environment: Environment, hanging: threading.Event
) -> None:
    jobs = [environment.submit() for _ in range(3)]
    environment.storage.refuses = lambda _key: hanging.wait(120) and False
    worker, shutdown = environment.image_worker(grace_s=0.1)
    assert worker.drain() == 3
    shutdown.begin()
    worker.finish()
    assert [environment.events(job_id)[-1] for job_id in jobs] == ["released"] * 3


def test_an_upload_that_hangs_stalls_and_its_process_goes_on(
    environment: Environment, hanging: threading.Event
) -> None:
    job_id = environment.submit(max_attempts=1)
    environment.storage.refuses = lambda _key: hanging.wait(120) and False
    environment.generate_due(stall_floor_s=0.5)
    assert environment.job(job_id).error_code == "stalled"
    assert not environment.hung


def test_a_prompt_that_hangs_in_the_encoder_stalls(environment: Environment, hanging: threading.Event) -> None:
    job_id = environment.submit(stage=Stage.ENCODE)
    worker, _ = environment.prompt_worker(
        encoder=StandInEncoder(before=lambda _request: hanging.wait(120) and None), stall_floor_s=0.5
    )
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(worker.drain)
        wait_until(lambda: environment.hung)
        assert last_detail(environment, job_id)["code"] == "stalled"
        hanging.set()
        working.result()


def test_time_without_storage_does_not_stall(environment: Environment) -> None:
    job_id = environment.submit()
    environment.storage.is_down = True
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(environment.generate_due, stall_floor_s=1.0, attempt_deadline_s=2.0)
        wait_until(lambda: len(environment.storage.refused) > 4)
        environment.storage.is_down = False
        working.result()
    assert environment.events(job_id) == ["queued", "claimed", "succeeded"]
