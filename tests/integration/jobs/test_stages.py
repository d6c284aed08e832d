"""A job whose prompt is encoded by one worker and painted by another."""

import uuid
from datetime import timedelta

import pytest

from tests.integration.jobs.examples import (
    DEFECT,
    LEASE_S,
    LOST,
    SLIP,
    Clock,
    cancel,
    claim,
    complete,
    events,
    fail,
    look,
    pass_on,
    reencode,
    rescue,
    row,
    submit,
)
from zcore.jobs import lifecycle, queries
from zcore.jobs.database import Database
from zcore.jobs.models import Job
from zcore.jobs.resource import snapshot
from zcore.jobs.states import State
from zcore.stages import Stage

ENCODE = [Stage.ENCODE]
GENERATE = [Stage.GENERATE]


def nothing_for(database: Database, stages: list[Stage]) -> bool:
    with database.write() as transaction:
        return lifecycle.claim(transaction, "idle", LEASE_S, stages) is None


def encoded(database: Database) -> Job:
    """A job that waits to be painted from its embedding."""
    job = submit(database, stage=Stage.ENCODE)
    assert pass_on(database, claim(database, "cpu-1", ENCODE)) is not None
    return look(database, job.id)


def to_clear(database: Database) -> list[uuid.UUID]:
    with database.read() as transaction:
        return [job.id for job in queries.ended_with_embedding(transaction, 100)]


def test_a_worker_gets_only_jobs_at_a_stage_that_it_serves(database: Database) -> None:
    split, whole = submit(database, stage=Stage.ENCODE, priority=-1), submit(database, priority=1)
    assert claim(database, "cpu-1", ENCODE).job_id == split.id
    assert nothing_for(database, ENCODE)
    assert claim(database, "gpu-1", GENERATE).job_id == whole.id
    assert nothing_for(database, GENERATE)


def test_who_serves_both_stages_takes_the_best_of_both(database: Database) -> None:
    jobs = [submit(database, stage=stage, priority=priority) for priority in (0, 5) for stage in Stage]
    assert [claim(database).job_id for _ in jobs] == [jobs[index].id for index in (2, 3, 0, 1)]


def test_an_encoded_job_waits_for_a_painter_and_its_attempt_cost_nothing(database: Database, clock: Clock) -> None:
    job = submit(database, stage=Stage.ENCODE, max_attempts=1)
    lease = claim(database, "cpu-1", ENCODE)
    clock.advance(3)
    assert pass_on(database, lease) is not None
    job = look(database, job.id)
    assert (job.status, job.stage, job.attempt, job.attempts_left) == ("queued", "generate", 1, 1)
    assert (job.embedding_attempt, job.lease_token) == (1, None)
    assert (job.metrics, job.engine) == ({"encode_ms": 7}, {"encoder": "cpu"})
    assert job.available_at == job.announced_at == clock.now, "the second wait begins, and its worker has rung"
    assert events(database, job.id) == ["queued", "claimed", "encoded"]
    assert nothing_for(database, ENCODE)
    assert complete(database, claim(database, "gpu-1", GENERATE)) is not None


def test_that_an_attempt_may_leave_an_embedding_is_noted_before_it_can(database: Database) -> None:
    job = submit(database, stage=Stage.ENCODE)
    claim(database, "cpu-1", ENCODE)
    assert look(database, job.id).embedding_attempt == 1


def test_who_paints_too_leaves_no_embedding(database: Database) -> None:
    job = submit(database, stage=Stage.ENCODE)
    complete(database, claim(database))
    assert look(database, job.id).embedding_attempt is None
    assert to_clear(database) == []


def test_a_wish_to_cancel_comes_before_the_second_stage(database: Database) -> None:
    job = submit(database, stage=Stage.ENCODE)
    lease = claim(database, "cpu-1", ENCODE)
    cancel(database, job.id)
    passed = pass_on(database, lease)
    assert passed is not None
    assert passed.status == State.CANCELED
    assert to_clear(database) == [job.id]


def test_a_job_without_its_embedding_is_encoded_again_until_its_attempts_are_used_up(database: Database) -> None:
    job = submit(database, stage=Stage.ENCODE, max_attempts=2)
    for left in (1, 0):
        pass_on(database, claim(database, "cpu-1", ENCODE))
        sent = reencode(database, claim(database, "gpu-1", GENERATE))
        assert sent is not None
        assert sent.attempts_left == left
        if left:
            assert (sent.status, sent.stage) == ("queued", "encode")
            assert sent.announced_at == sent.available_at
    job = look(database, job.id)
    assert (job.status, job.error_code) == ("failed", LOST.code)
    assert events(database, job.id) == ["queued", *["claimed", "encoded", "claimed"] * 1, "sent_to_encode",
                                        "claimed", "encoded", "claimed", "failed"]  # fmt: skip


def test_a_job_that_nobody_has_encoded_goes_there_without_losing_an_attempt(database: Database) -> None:
    job = submit(database, max_attempts=1)
    assert reencode(database, claim(database, "gpu-1", GENERATE)) is not None
    assert (look(database, job.id).stage, look(database, job.id).attempts_left) == ("encode", 1)
    pass_on(database, claim(database, "cpu-1", ENCODE))
    assert complete(database, claim(database, "gpu-1", GENERATE)) is not None


@pytest.mark.parametrize("end", ["rescued", "postponed", "handed_back"])
def test_what_was_encoded_stays_so_when_its_painter_goes(database: Database, clock: Clock, end: str) -> None:
    job = encoded(database)
    lease = claim(database, "gpu-1", GENERATE)
    if end == "rescued":
        clock.advance(LEASE_S + 1)
        rescue(database)
    elif end == "postponed":
        fail(database, lease, SLIP)
    else:
        with database.write() as transaction:
            lifecycle.hand_back(transaction, lease)
    job = look(database, job.id)
    assert events(database, job.id)[-1] == end
    assert (job.status, job.stage, job.embedding_attempt) == ("queued", "generate", 1)
    assert to_clear(database) == []


def test_a_lost_lease_passes_nothing_on(database: Database, clock: Clock) -> None:
    job = submit(database, stage=Stage.ENCODE)
    lost = claim(database, "cpu-1", ENCODE)
    clock.advance(LEASE_S + 1)
    rescue(database)
    claim(database, "cpu-2", ENCODE)
    before = row(look(database, job.id))
    assert pass_on(database, lost) is None
    assert reencode(database, lost) is None
    assert row(look(database, job.id)) == before
    assert before["embedding_attempt"] == 2


@pytest.mark.parametrize("ending", ["complete", "fail", "cancel"])
def test_whatever_ends_a_job_its_embeddings_are_to_be_deleted_once(database: Database, ending: str) -> None:
    job = encoded(database)
    assert to_clear(database) == []
    if ending == "cancel":
        cancel(database, job.id)
    else:
        lease = claim(database, "gpu-1", GENERATE)
        complete(database, lease) if ending == "complete" else fail(database, lease, DEFECT)
    assert to_clear(database) == [job.id]
    with database.write() as transaction:
        assert lifecycle.forget_embeddings(transaction, job.id, look(database, job.id).attempt)
    assert to_clear(database) == []


def test_a_job_that_went_on_meanwhile_keeps_the_note_of_its_embeddings(database: Database) -> None:
    job = encoded(database)
    fail(database, claim(database, "gpu-1", GENERATE), DEFECT)
    with database.write() as transaction:
        lifecycle.retry(transaction, job.id, 3)
    with database.write() as transaction:
        assert not lifecycle.forget_embeddings(transaction, job.id, 2)
    fail(database, claim(database, "gpu-1", GENERATE), DEFECT)
    with database.write() as transaction:
        assert not lifecycle.forget_embeddings(transaction, job.id, 2)
    assert to_clear(database) == [job.id]


def test_a_retried_job_keeps_its_embedding_while_it_has_one_and_else_begins_anew(database: Database) -> None:
    job = encoded(database)
    fail(database, claim(database, "gpu-1", GENERATE), DEFECT)
    with database.write() as transaction:
        assert lifecycle.retry(transaction, job.id, 3, Stage.ENCODE).stage == Stage.GENERATE
    fail(database, claim(database, "gpu-1", GENERATE), DEFECT)
    with database.write() as transaction:
        lifecycle.forget_embeddings(transaction, job.id, 3)
        assert lifecycle.retry(transaction, job.id, 3, Stage.ENCODE).stage == Stage.ENCODE


def test_the_place_in_the_queue_is_that_among_jobs_at_the_same_stage(database: Database) -> None:
    jobs = [submit(database, stage=stage) for stage in (Stage.ENCODE, Stage.GENERATE, Stage.GENERATE, Stage.ENCODE)]
    with database.read() as transaction:
        assert [queries.queue_position(transaction, job) for job in jobs] == [1, 1, 2, 2]


def test_callers_see_the_stage_until_the_job_has_ended(database: Database) -> None:
    job = submit(database, stage=Stage.ENCODE)
    assert snapshot(job).stage == "encode"
    pass_on(database, claim(database, "cpu-1", ENCODE))
    assert snapshot(look(database, job.id)).stage == "generate"
    complete(database, claim(database, "gpu-1", GENERATE))
    assert snapshot(look(database, job.id)).stage is None


def test_only_the_silent_of_a_stage_are_announced(database: Database, clock: Clock) -> None:
    for stage in (Stage.ENCODE, Stage.ENCODE, Stage.GENERATE):
        submit(database, stage=stage)
    clock.advance(11)
    with database.write() as transaction:
        assert lifecycle.mark_announced(transaction, Stage.ENCODE, 10, 100) == 2
        assert lifecycle.mark_announced(transaction, Stage.ENCODE, 10, 100) == 0
        assert lifecycle.mark_announced(transaction, Stage.GENERATE, 10, 100) == 1


def test_a_late_encoder_that_still_holds_its_lease_passes_on(database: Database, clock: Clock) -> None:
    job = submit(database, stage=Stage.ENCODE)
    lease = claim(database, "cpu-1", ENCODE)
    clock.advance(LEASE_S * 2)
    passed = pass_on(database, lease)
    assert passed is not None
    assert passed.available_at - job.available_at == timedelta(seconds=LEASE_S * 2)
