"""A job whose worker died runs alone: what it may do to its worker, it does to no other job."""

import threading
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

from tests.integration.worker.conftest import Environment
from tests.waiting import wait_until
from zcore.jobs import claims, recovery
from zcore.request import GenerationRequest


def suspects(environment: Environment, *prompts: str) -> list[UUID]:
    """Return jobs whose worker has died."""
    job_ids = [environment.submit(prompt=prompt) for prompt in prompts]
    for _ in job_ids:
        with environment.database.write() as transaction:
            claims.claim(transaction, "worker-0", -1)
    with environment.database.write() as transaction:
        assert all(job.isolated for job in recovery.rescue(transaction))
    return job_ids


def statuses(environment: Environment, *job_ids: UUID) -> list[str]:
    return [environment.job(job_id).status for job_id in job_ids]


def test_a_suspect_waits_for_the_uploads_of_others_and_others_for_its_own(environment: Environment) -> None:
    (alone,) = suspects(environment, "suspect")
    first, last = environment.submit(prompt="first", priority=1), environment.submit(prompt="last")
    gates = {str(first): threading.Event(), str(alone): threading.Event()}

    def wait_at_gate(key: str) -> bool:
        gate = gates.get(key.split("/")[1])
        return gate is not None and not gate.wait(60)

    def generated() -> list[str]:
        return [request.prompt for request in environment.pipeline.requests]

    environment.storage.refuses = wait_at_gate
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(environment.generate_due)
        try:
            wait_until(lambda: environment.job(alone).status == "running")
            assert generated() == ["first"], "its images are not stored yet"
            gates[str(first)].set()
            wait_until(lambda: len(generated()) == 2)
            assert statuses(environment, first, alone, last) == ["succeeded", "running", "queued"]
        finally:
            for gate in gates.values():
                gate.set()
        assert working.result() == 3
    assert generated() == ["first", "suspect", "last"]
    assert statuses(environment, first, alone, last) == ["succeeded"] * 3


def test_a_canceled_suspect_does_not_wait_for_the_uploads_of_others(environment: Environment) -> None:
    (alone,) = suspects(environment, "suspect")
    environment.submit(prompt="first", priority=1)
    gate = threading.Event()
    environment.storage.refuses = lambda _key: not gate.wait(60)
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(environment.generate_due)
        try:
            wait_until(lambda: environment.job(alone).status == "running")
            environment.cancel(alone)
            wait_until(lambda: environment.job(alone).status == "canceled")
        finally:
            gate.set()
        working.result()
    assert [request.prompt for request in environment.pipeline.requests] == ["first"]


def test_crashes_of_suspects_say_nothing_about_the_process(environment: Environment) -> None:
    def crash(_request: GenerationRequest, _step: int) -> None:
        raise RuntimeError("this job only")

    suspects(environment, "one", "two", "three", "four")
    environment.pipeline.before_step = crash
    assert environment.generate_due(retry_delay_s=3600) == 4
    assert not environment.broken.is_set()
