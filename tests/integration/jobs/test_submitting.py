"""A submission becomes one queued job; its Idempotency-Key makes that true of its repeats too."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.integration.jobs.examples import Clock, all_jobs, events, look, submission, submit, told, wait_until_blocked
from zcore.errors import KeyReused
from zcore.jobs import lifecycle
from zcore.jobs.database import Database
from zcore.jobs.lifecycle import Submitted
from zcore.jobs.states import State

DAY_S = 24 * 3600


def submit_keyed(database: Database, key: str, body: str = "body", owner: str = "anna") -> Submitted:
    with database.write() as transaction:
        return lifecycle.submit(transaction, submission(), owner, body, 3, idempotency_key=key)


def test_a_submission_is_stored_whole_and_queued(database: Database, clock: Clock) -> None:
    wanted = submission(prompt="two foxes", seed=2**63 - 1, priority=4, metadata={"order": [1, {"x": "ü"}]}, n=2)
    with database.write() as transaction:
        made = lifecycle.submit(transaction, wanted, "anna", "f" * 64, 5)
    job = look(database, made.job.id)
    assert not made.replayed
    assert (job.owner, job.status, job.priority, job.prompt) == ("anna", State.QUEUED, 4, "two foxes")
    assert job.request["seed"] == 2**63 - 1
    assert job.request["n"] == 2
    assert job.caller_metadata == {"order": [1, {"x": "ü"}]}
    assert (job.attempt, job.attempts_left, job.lease_token) == (0, 5, None)
    assert job.created_at == job.available_at == job.announced_at == clock.now
    assert events(database, job.id) == ["queued"]
    assert told(database, job.id) == []


def test_a_rolled_back_submission_leaves_nothing(database: Database) -> None:
    with pytest.raises(ZeroDivisionError), database.write() as transaction:
        lifecycle.submit(transaction, submission(), "anna", "f", 3)
        raise ZeroDivisionError
    assert all_jobs(database) == []


def test_the_same_key_and_body_give_the_job_again(database: Database) -> None:
    first, second = submit_keyed(database, "k"), submit_keyed(database, "k")
    assert (first.replayed, second.replayed) == (False, True)
    assert first.job.id == second.job.id
    assert len(all_jobs(database)) == 1
    assert events(database, first.job.id) == ["queued"]


def test_the_same_key_with_another_body_is_refused(database: Database) -> None:
    submit_keyed(database, "k")
    with pytest.raises(KeyReused, match="already used with another body"):
        submit_keyed(database, "k", body="another body")
    assert len(all_jobs(database)) == 1


def test_two_callers_may_choose_the_same_key(database: Database) -> None:
    assert submit_keyed(database, "k", owner="anna").job.id != submit_keyed(database, "k", owner="ben").job.id


def test_submissions_without_a_key_are_never_taken_for_repeats(database: Database) -> None:
    assert submit(database).id != submit(database).id


def test_a_key_is_forgotten_after_a_day_and_not_before(database: Database, clock: Clock) -> None:
    first = submit_keyed(database, "k")
    clock.advance(DAY_S - 1)
    assert submit_keyed(database, "k").job.id == first.job.id
    clock.advance(1)
    again = submit_keyed(database, "k", body="another body")
    assert not again.replayed
    assert again.job.id != first.job.id
    assert submit_keyed(database, "k", body="another body").job.id == again.job.id


def test_old_keys_are_cleared_away_and_young_ones_kept(database: Database, clock: Clock) -> None:
    old = submit_keyed(database, "old").job
    clock.advance(DAY_S)
    young = submit_keyed(database, "young").job
    clock.advance(1)
    with database.write() as transaction:
        lifecycle.forget_idempotency_keys(transaction)
    assert look(database, old.id).idempotency_key is None
    assert look(database, young.id).idempotency_key == "young"


@pytest.mark.timeout(120)
def test_one_key_from_many_threads_at_once_makes_one_job(database: Database) -> None:
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


def test_a_repeat_waits_for_an_uncommitted_first_and_gets_its_job(postgresql: Database) -> None:
    with ThreadPoolExecutor(1) as pool:
        with postgresql.write() as transaction:
            first = lifecycle.submit(transaction, submission(), "anna", "body", 3, idempotency_key="k")
            repeat = pool.submit(submit_keyed, postgresql, "k")
            wait_until_blocked(postgresql)
        assert repeat.result(30).replayed
        assert repeat.result().job.id == first.job.id


def test_a_repeat_becomes_the_first_when_that_rolls_back(postgresql: Database) -> None:
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(ZeroDivisionError), postgresql.write() as transaction:
            lifecycle.submit(transaction, submission(), "anna", "body", 3, idempotency_key="k")
            repeat = pool.submit(submit_keyed, postgresql, "k")
            wait_until_blocked(postgresql)
            raise ZeroDivisionError
        assert not repeat.result(30).replayed
    assert len(all_jobs(postgresql)) == 1


def test_ids_made_in_a_row_sort_in_that_order() -> None:
    ids = [lifecycle.new_id() for _ in range(10_000)]
    assert ids == sorted(set(ids))
    assert {one.version for one in ids} == {7}
