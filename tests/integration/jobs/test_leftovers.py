"""Objects that belong to no row are recorded when their job ends, and forgotten after they were deleted."""

import uuid
from collections.abc import Sequence

import pytest
from sqlalchemy import select

from tests.integration.jobs.examples import (
    LEASE_S,
    PERMANENT,
    RETENTION_S,
    TRANSIENT,
    Clock,
    cancel,
    claim,
    complete,
    complete_encoding,
    fail,
    fetch,
    rescue,
    submit,
)
from zcore.jobs import leftovers, lifecycle, queries, recovery
from zcore.jobs.database import Database
from zcore.jobs.guarded_update import LEFTOVER_DELAY
from zcore.jobs.models import Job, Leftover
from zcore.stages import Stage


def due(database: Database) -> dict[uuid.UUID, list[str]]:
    """Return the names of the objects that may be deleted now, by job."""
    return {one.job_id: [key.rpartition("/")[2] for key in leftovers.keys(one)] for one in due_rows(database)}


def due_rows(database: Database) -> Sequence[Leftover]:
    with database.read() as transaction:
        return transaction.session.scalars(select(Leftover).where(leftovers.is_due(transaction, Leftover))).all()


def forget(database: Database) -> None:
    """Forget what is due, as if its objects had been deleted."""
    with database.write() as transaction:
        for one in leftovers.claim_due(transaction, 100):
            leftovers.forget(transaction, one)


def count(database: Database) -> int:
    with database.read() as transaction:
        return transaction.session.query(Leftover).count()


def encoded(database: Database, **fields: object) -> Job:
    """Return a job that is encoded and waits for generation."""
    job = submit(database, stage=Stage.ENCODE, **fields)
    assert complete_encoding(database, claim(database, "cpu-1", [Stage.ENCODE])) is not None
    return job


def test_a_job_that_succeeds_at_its_first_attempt_leaves_nothing(database: Database, clock: Clock) -> None:
    submit(database)
    complete(database, claim(database))
    clock.advance(LEFTOVER_DELAY.total_seconds())
    assert due(database) == {}


def test_a_job_canceled_in_the_queue_leaves_nothing(database: Database, clock: Clock) -> None:
    cancel(database, submit(database).id)
    clock.advance(LEFTOVER_DELAY.total_seconds())
    assert due(database) == {}


def test_a_lost_worker_has_time_to_store_its_last_object(database: Database, clock: Clock) -> None:
    job = submit(database, n=2, format="avif")
    fail(database, claim(database), PERMANENT)
    clock.advance(LEFTOVER_DELAY.total_seconds() - 1)
    assert due(database) == {}
    clock.advance(1)
    assert due(database) == {job.id: ["1-0.avif", "1-1.avif", "embedding-1.safetensors"]}
    forget(database)
    assert count(database) == 0


def test_the_images_of_a_succeeded_job_are_not_deleted(database: Database, clock: Clock) -> None:
    job = submit(database)
    claim(database)
    clock.advance(LEASE_S + 1)
    rescue(database)
    complete(database, claim(database))
    clock.advance(LEFTOVER_DELAY.total_seconds())
    [names] = due(database).values()
    assert [name for name in names if not name.startswith("embedding")] == ["1-0.png"]
    assert fetch(database, job.id).attempt == 2


@pytest.mark.parametrize("ending", ["complete", "fail", "cancel"])
def test_the_embeddings_of_every_ended_job_are_left_over(database: Database, clock: Clock, ending: str) -> None:
    job = encoded(database)
    if ending == "cancel":
        cancel(database, job.id)
    else:
        lease = claim(database, "gpu-1", [Stage.GENERATE])
        complete(database, lease) if ending == "complete" else fail(database, lease, PERMANENT)
    clock.advance(LEFTOVER_DELAY.total_seconds())
    assert "embedding-1.safetensors" in due(database)[job.id]


def test_a_retried_job_keeps_its_embedding_until_it_ends_again(database: Database, clock: Clock) -> None:
    job = encoded(database)
    fail(database, claim(database, "gpu-1", [Stage.GENERATE]), PERMANENT)
    clock.advance(LEFTOVER_DELAY.total_seconds())
    with database.write() as transaction:
        [claimed] = leftovers.claim_due(transaction, 100)
    with database.write() as transaction:
        retried = lifecycle.retry(transaction, job.id, 3, Stage.ENCODE)
        assert (retried.stage, retried.embedding_attempt) == (Stage.GENERATE, 1)
    assert due(database) == {}
    fail(database, claim(database, "gpu-1", [Stage.GENERATE]), PERMANENT)
    with database.write() as transaction:
        leftovers.forget(transaction, claimed)
    assert count(database) == 1, "another attempt has begun since"
    clock.advance(LEFTOVER_DELAY.total_seconds())
    assert list(due(database)) == [job.id]


def test_a_job_retried_after_its_embedding_was_deleted_is_encoded_again(database: Database, clock: Clock) -> None:
    job = encoded(database)
    fail(database, claim(database, "gpu-1", [Stage.GENERATE]), PERMANENT)
    clock.advance(LEFTOVER_DELAY.total_seconds())
    forget(database)
    with database.write() as transaction:
        retried = lifecycle.retry(transaction, job.id, 3, Stage.ENCODE)
    assert (retried.stage, retried.embedding_attempt, retried.attempt) == (Stage.ENCODE, None, 2)


def test_a_job_that_waits_for_another_attempt_leaves_nothing_yet(database: Database, clock: Clock) -> None:
    submit(database)
    fail(database, claim(database), TRANSIENT)
    clock.advance(LEFTOVER_DELAY.total_seconds())
    assert due(database) == {}


def test_the_images_of_an_expired_job_are_left_over_with_those_of_its_earlier_attempts(
    database: Database, clock: Clock
) -> None:
    job = submit(database)
    claim(database)
    clock.advance(LEASE_S + 1)
    rescue(database)
    complete(database, claim(database))
    with database.write() as transaction:
        queries.get(transaction, job.id).expires_at = transaction.now
    with database.write() as transaction:
        assert recovery.expire(transaction, job.id) is not None
    [names] = due(database).values()
    assert [name for name in names if not name.startswith("embedding")] == ["1-0.png", "2-0.png"]


def test_a_job_that_expires_while_its_earlier_objects_are_deleted_is_not_forgotten(
    database: Database, clock: Clock
) -> None:
    job = submit(database)
    claim(database)
    clock.advance(LEASE_S + 1)
    rescue(database)
    complete(database, claim(database))
    clock.advance(max(LEFTOVER_DELAY.total_seconds(), RETENTION_S))
    with database.write() as transaction:
        [claimed] = leftovers.claim_due(transaction, 100)
    with database.write() as transaction:
        assert recovery.expire(transaction, job.id) is not None
    with database.write() as transaction:
        leftovers.forget(transaction, claimed)
    assert list(due(database)) == [job.id]


def test_an_object_recorded_again_while_it_is_deleted_is_not_forgotten(database: Database, clock: Clock) -> None:
    with database.write() as transaction:
        leftovers.add_object(transaction, "inputs/late")
    with database.write() as transaction:
        [claimed] = leftovers.claim_due(transaction, 100)
    with database.write() as transaction:
        leftovers.add_object(transaction, "inputs/late")
    with database.write() as transaction:
        leftovers.forget(transaction, claimed)
    with database.write() as transaction:
        [again] = leftovers.claim_due(transaction, 100)
        assert leftovers.keys(again) == ["inputs/late"]
        leftovers.forget(transaction, again)
    clock.advance(leftovers.LONGEST_RETRY.total_seconds())
    with database.write() as transaction:
        assert leftovers.claim_due(transaction, 100) == []
