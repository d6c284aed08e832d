"""A job as its caller sees it, in every state."""

from datetime import timedelta

import msgspec
import pytest

from tests.integration.jobs.examples import (
    LEASE_S,
    RETENTION_S,
    SLIP,
    Clock,
    claim,
    complete,
    fail,
    job_in,
    look,
    submit,
)
from zcore.jobs import lifecycle
from zcore.jobs.database import Database
from zcore.jobs.models import Job
from zcore.jobs.resource import JobResource, describe, linked, snapshot
from zcore.jobs.states import State
from zcore.storage import Link

HERE = "https://pictures.example"


def shown(job: Job, clock: Clock) -> JobResource:
    return describe(job, HERE, lambda key: Link(f"{HERE}/files/{key}", clock.now + timedelta(hours=1)))


@pytest.mark.parametrize("state", list(State))
def test_every_state_is_shown_with_its_times_and_addresses(sqlite: Database, clock: Clock, state: State) -> None:
    job = job_in(state, sqlite, clock, metadata={"order": 7})
    seen = shown(job, clock)
    assert (seen.id, seen.status, seen.metadata) == (str(job.id), state, {"order": 7})
    assert seen.request == job.request
    assert (seen.created_at, seen.completed_at) == (job.created_at, job.completed_at)
    assert seen.urls is not None
    assert seen.urls.self == f"{HERE}/api/jobs/{job.id}"
    assert seen.urls.cancel == f"{HERE}/api/jobs/{job.id}/cancel"
    assert (seen.error is not None) == (state is State.FAILED)


def test_pictures_have_links_until_they_are_purged(sqlite: Database, clock: Clock) -> None:
    job = job_in(State.SUCCEEDED, sqlite, clock)
    [output] = shown(job, clock).outputs
    assert output.url == f"{HERE}/files/{job.outputs[0].key}"
    assert output.expires_at == clock.now + timedelta(hours=1)
    clock.advance(RETENTION_S)
    with sqlite.write() as transaction:
        lifecycle.expire(transaction, job.id)
    [output] = shown(look(sqlite, job.id), clock).outputs
    assert (output.url, output.expires_at) == (None, None)
    assert output.sha256 == "a" * 64


def test_progress_is_a_share_of_all_steps(sqlite: Database, clock: Clock) -> None:
    submit(sqlite)
    lease = claim(sqlite)
    assert shown(look(sqlite, lease.job_id), clock).progress is None
    with sqlite.write() as transaction:
        lifecycle.heartbeat(transaction, lease, LEASE_S, ("denoising", 6, 16))
    progress = shown(look(sqlite, lease.job_id), clock).progress
    assert progress is not None
    assert (progress.phase, progress.step, progress.steps, progress.fraction) == ("denoising", 6, 16, 0.375)


def test_an_error_says_whether_to_try_again(sqlite: Database, clock: Clock) -> None:
    job = submit(sqlite, max_attempts=1)
    fail(sqlite, claim(sqlite), SLIP)
    error = shown(look(sqlite, job.id), clock).error
    assert error is not None
    assert (error.code, error.message, error.retryable) == (SLIP.code, SLIP.message, True)


def test_a_snapshot_kept_as_json_is_the_same_job(database: Database, clock: Clock) -> None:
    """What a webhook tells is read back from the database and given fresh links."""
    job = submit(database, seed=2**63 - 1, prompt="狐狸 🦊")
    complete(database, claim(database))
    kept = snapshot(look(database, job.id))
    again = msgspec.json.decode(msgspec.json.encode(kept), type=JobResource)
    assert again == kept
    assert linked(again, {}, HERE, lambda key: Link(key, clock.now)).outputs[0].url is None
