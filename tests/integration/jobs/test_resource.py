"""A job as its caller sees it, in every state."""

import dataclasses
from datetime import timedelta

import msgspec
import pytest

from tests.integration.jobs.examples import (
    LEASE_S,
    RETENTION_S,
    TRANSIENT,
    Clock,
    claim,
    complete,
    fail,
    fetch,
    job_in,
    submit,
)
from zcore.imaging.result import GenerationMetrics
from zcore.jobs import claims, recovery
from zcore.jobs.database import Database
from zcore.jobs.models import Job
from zcore.jobs.resource import JobMetrics, JobResource, describe, linked, snapshot
from zcore.jobs.states import State
from zcore.request import GenerationRequest
from zcore.storage import Link

PUBLIC_URL = "https://images.example"


def described(job: Job, clock: Clock) -> JobResource:
    def link(key: str, name: str) -> Link:
        url = f"{PUBLIC_URL}/files/{key}"
        return Link(url, f"{url}?download={name}", clock.now + timedelta(hours=1))

    return describe(job, PUBLIC_URL, link)


@pytest.mark.parametrize("state", list(State))
def test_every_state_is_described_with_its_times_and_urls(sqlite: Database, clock: Clock, state: State) -> None:
    job = job_in(state, sqlite, clock, metadata={"order": 7})
    seen = described(job, clock)
    assert (seen.id, seen.status, seen.metadata) == (str(job.id), state, {"order": 7})
    assert seen.request == job.request
    assert (seen.created_at, seen.completed_at) == (job.created_at, job.completed_at)
    assert seen.urls is not None
    assert seen.urls.self == f"{PUBLIC_URL}/api/jobs/{job.id}"
    assert seen.urls.cancel == f"{PUBLIC_URL}/api/jobs/{job.id}/cancel"
    assert (seen.error is not None) == (state is State.FAILED)


def test_a_request_has_the_order_of_its_declaration_on_every_database(database: Database, clock: Clock) -> None:
    """PostgreSQL returns the keys of a JSONB document in an order of its own."""
    assert list(described(submit(database), clock).request) == list(GenerationRequest.__struct_fields__)


def test_every_measured_value_is_described() -> None:
    assert {field.name for field in dataclasses.fields(GenerationMetrics)} <= set(JobMetrics.__struct_fields__)


def test_images_have_links_until_they_are_deleted(sqlite: Database, clock: Clock) -> None:
    job = job_in(State.SUCCEEDED, sqlite, clock)
    [output] = described(job, clock).outputs
    assert output.url == f"{PUBLIC_URL}/files/{job.outputs[0].key}"
    assert output.download_url == f"{output.url}?download={job.id}-0.png"
    assert output.expires_at == clock.now + timedelta(hours=1)
    clock.advance(RETENTION_S)
    with sqlite.write() as transaction:
        recovery.expire(transaction, job.id)
    [output] = described(fetch(sqlite, job.id), clock).outputs
    assert (output.url, output.download_url, output.expires_at) == (None, None, None)
    assert output.sha256 == "a" * 64


def test_progress_is_a_fraction_of_all_steps(sqlite: Database, clock: Clock) -> None:
    submit(sqlite)
    lease = claim(sqlite)
    assert described(fetch(sqlite, lease.job_id), clock).progress is None
    with sqlite.write() as transaction:
        claims.heartbeat(transaction, lease, LEASE_S, ("denoising", 6, 16))
    progress = described(fetch(sqlite, lease.job_id), clock).progress
    assert progress is not None
    assert (progress.phase, progress.step, progress.steps, progress.fraction) == ("denoising", 6, 16, 0.375)


def test_an_error_states_whether_it_is_retryable(sqlite: Database, clock: Clock) -> None:
    job = submit(sqlite, max_attempts=1)
    fail(sqlite, claim(sqlite), TRANSIENT)
    error = described(fetch(sqlite, job.id), clock).error
    assert error is not None
    assert (error.code, error.message, error.retryable) == (TRANSIENT.code, TRANSIENT.message, True)


def test_a_snapshot_survives_json(database: Database, clock: Clock) -> None:
    """Webhook deliveries read the snapshot from the database and add fresh links."""
    job = submit(database, seed=2**63 - 1, prompt="狐狸 🦊")
    complete(database, claim(database))
    stored = snapshot(fetch(database, job.id))
    again = msgspec.json.decode(msgspec.json.encode(stored), type=JobResource)
    assert again == stored
    assert linked(again, {}, PUBLIC_URL, lambda key, name: Link(key, name, clock.now)).outputs[0].url is None
