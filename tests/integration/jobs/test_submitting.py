"""A submission becomes one queued job, and so do its repeats with the same Idempotency-Key."""

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from sqlalchemy import JSON, select, type_coerce

from tests.integration.jobs.examples import (
    Clock,
    all_jobs,
    events,
    fetch,
    submission,
    submit,
    wait_until_blocked,
    webhook_types,
)
from zcore.errors import InvalidRequest, KeyReused
from zcore.jobs import lifecycle, queries, recovery
from zcore.jobs.database import Database, IdSource
from zcore.jobs.lifecycle import Submitted
from zcore.jobs.models import IdempotencyKey, Job
from zcore.jobs.resource import snapshot
from zcore.jobs.states import State
from zcore.request import Dype, GenerationRequest, LoraUse, Pass, SkipLayerGuidance

DAY_S = 24 * 3600


def submit_keyed(database: Database, key: str, body: str = "body", owner: str = "anna") -> Submitted:
    with database.write() as transaction:
        return lifecycle.submit(transaction, submission(), owner, body, 3, idempotency_key=key)


def test_a_submission_is_stored_completely_and_queued(database: Database, clock: Clock) -> None:
    query = submission(prompt="two foxes", seed=2**63 - 1, priority=4, metadata={"order": [1, {"x": "ü"}]}, n=2)
    with database.write() as transaction:
        made = lifecycle.submit(transaction, query, "anna", "f" * 64, 5)
    job = fetch(database, made.job.id)
    assert not made.replayed
    assert (job.owner, job.status, job.priority, job.prompt) == ("anna", State.QUEUED, 4, "two foxes")
    assert job.request["seed"] == 2**63 - 1
    assert job.request["n"] == 2
    assert job.caller_metadata == {"order": [1, {"x": "ü"}]}
    assert (job.attempt, job.attempts_left, job.lease_token) == (0, 5, None)
    assert job.created_at == job.available_at == job.notified_at == clock.now
    assert events(database, job.id) == ["queued"]
    assert webhook_types(database, job.id) == []


def test_a_stored_request_is_complete_but_for_what_is_null(database: Database) -> None:
    query = submission(template="photo", guidance_scale=2.0)
    with database.write() as transaction:
        made = lifecycle.submit(transaction, query, "anna", "f" * 64, 5)
        stored = transaction.session.scalars(select(type_coerce(Job.request, JSON))).one()
    complete = msgspec.json.decode(msgspec.json.encode(query.request))
    assert stored == {name: value for name, value in complete.items() if value is not None}
    assert fetch(database, made.job.id).request == complete


def test_a_rolled_back_submission_leaves_nothing(database: Database) -> None:
    with pytest.raises(ZeroDivisionError), database.write() as transaction:
        lifecycle.submit(transaction, submission(), "anna", "f", 3)
        raise ZeroDivisionError
    assert all_jobs(database) == []


def test_the_same_key_and_body_return_the_same_job(database: Database) -> None:
    first, second = submit_keyed(database, "k"), submit_keyed(database, "k")
    assert (first.replayed, second.replayed) == (False, True)
    assert first.job.id == second.job.id
    assert len(all_jobs(database)) == 1
    assert events(database, first.job.id) == ["queued"]


def test_the_same_key_with_another_body_is_refused(database: Database) -> None:
    submit_keyed(database, "k")
    with pytest.raises(KeyReused, match="already used with a different body"):
        submit_keyed(database, "k", body="another body")
    assert len(all_jobs(database)) == 1


def test_two_callers_may_choose_the_same_key(database: Database) -> None:
    assert submit_keyed(database, "k", owner="anna").job.id != submit_keyed(database, "k", owner="ben").job.id


def test_submissions_without_a_key_are_never_repeats(database: Database) -> None:
    assert submit(database).id != submit(database).id


def test_a_key_is_valid_for_exactly_a_day(database: Database, clock: Clock) -> None:
    first = submit_keyed(database, "k")
    clock.advance(DAY_S - 1)
    assert submit_keyed(database, "k").job.id == first.job.id
    clock.advance(1)
    again = submit_keyed(database, "k", body="another body")
    assert not again.replayed
    assert again.job.id != first.job.id
    assert submit_keyed(database, "k", body="another body").job.id == again.job.id


def test_only_keys_older_than_a_day_are_freed(database: Database, clock: Clock) -> None:
    for name in ("old", "older", "oldest"):
        submit_keyed(database, name)
    clock.advance(DAY_S)
    young = submit_keyed(database, "young").job
    clock.advance(1)
    with database.write() as transaction:
        assert recovery.forget_idempotency_keys(transaction, 2), "one is left"
        assert not recovery.forget_idempotency_keys(transaction, 2)
    with database.read() as transaction:
        keys = transaction.session.execute(select(IdempotencyKey.key, IdempotencyKey.job_id)).all()
    assert keys == [("young", young.id)]


@pytest.mark.timeout(120)
def test_one_key_from_many_threads_at_once_creates_one_job(database: Database) -> None:
    threads, keys = 6, 5
    barrier = threading.Barrier(threads)

    def race(key: str) -> Submitted:
        barrier.wait()
        return submit_keyed(database, key)

    with ThreadPoolExecutor(threads) as pool:
        for number in range(keys):
            made = list(pool.map(race, [f"key-{number}"] * threads))
            assert len({one.job.id for one in made}) == 1
            assert sorted(one.replayed for one in made) == [False] + [True] * (threads - 1)
    assert len(all_jobs(database)) == keys


def test_a_repeat_waits_for_the_uncommitted_first_and_returns_its_job(postgresql: Database) -> None:
    with ThreadPoolExecutor(1) as pool:
        with postgresql.write() as transaction:
            first = lifecycle.submit(transaction, submission(), "anna", "body", 3, idempotency_key="k")
            repeat = pool.submit(submit_keyed, postgresql, "k")
            wait_until_blocked(postgresql)
        assert repeat.result(30).replayed
        assert repeat.result().job.id == first.job.id


def test_a_repeat_creates_the_job_if_the_first_rolls_back(postgresql: Database) -> None:
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(ZeroDivisionError), postgresql.write() as transaction:
            lifecycle.submit(transaction, submission(), "anna", "body", 3, idempotency_key="k")
            repeat = pool.submit(submit_keyed, postgresql, "k")
            wait_until_blocked(postgresql)
            raise ZeroDivisionError
        assert not repeat.result(30).replayed
    assert len(all_jobs(postgresql)) == 1


def test_ids_sort_in_the_order_of_their_creation_while_the_clock_stands_still(clock: Clock) -> None:
    source = IdSource()
    ids = [source.new(clock.now) for _ in range(10_000)]
    clock.advance(-60)
    ids.append(source.new(clock.now))
    assert ids == sorted(set(ids))
    assert {(one.version, one.variant) for one in ids} == {(7, uuid.RFC_4122)}


def test_the_id_of_a_job_states_the_time_of_its_transaction(database: Database, clock: Clock) -> None:
    clock.advance(0.000_5)
    job = submit(database)
    assert job.id.int >> 80 == int(clock.now.timestamp() * 1000)
    assert job.id.int >> 64 & 0xFFF == 0x800, "half a millisecond"


def test_a_key_whose_request_is_refused_can_be_used_again(database: Database) -> None:
    with pytest.raises(InvalidRequest), database.write() as transaction:
        refused = submission(image=f"input:{'a' * 64}")
        lifecycle.submit(transaction, refused, "anna", "body", 3, idempotency_key="k")
    assert not submit_keyed(database, "k", body="another body").replayed


def test_a_stored_request_is_returned_in_declared_order(database: Database) -> None:
    """Its text is the same after a submission and ever after; PostgreSQL sorts the keys of a document by length."""
    passes = (Pass(scale=0.5, slg=SkipLayerGuidance(layers=(1,))), Pass(scale=1.0, strength=0.5))
    fields = {"slg": SkipLayerGuidance(), "dype": Dype(), "passes": passes, "loras": (LoraUse(name="night"),)}
    job = submit(database, **msgspec.to_builtins(fields))
    with database.read() as transaction:
        stored = snapshot(queries.get(transaction, job.id, refresh=True)).request
    assert msgspec.json.encode(stored) == msgspec.json.encode(msgspec.convert(stored, GenerationRequest))
