"""`Idempotency-Key`: asking twice makes one job."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from uuid import UUID, uuid4

import pytest

from tests.integration.api.conftest import Api, pointers, problem
from zcore.jobs import queries


@pytest.fixture
def key() -> str:
    """A key nobody has used."""
    return f"order-{uuid4()}"


def test_the_same_key_and_body_give_the_same_job(open_api: Api, key: str) -> None:
    first = open_api.submit({"idempotency-key": key}, prompt="once")
    again = open_api.submit({"idempotency-key": key}, prompt="once")
    assert first.json()["id"] == again.json()["id"]
    assert first.json()["request"]["seed"] == again.json()["request"]["seed"]
    assert "idempotency-replayed" not in first.headers
    assert (again.status_code, again.headers["idempotency-replayed"]) == (202, "true")


def test_a_key_may_stand_in_quotes_as_the_draft_wants_it(open_api: Api, key: str) -> None:
    bare = open_api.submit({"idempotency-key": key})
    quoted = open_api.submit({"idempotency-key": f'"{key}"'})
    assert bare.json()["id"] == quoted.json()["id"]


def test_the_same_body_in_another_spelling_is_the_same(open_api: Api, key: str) -> None:
    headers = {"idempotency-key": key, "content-type": "application/json"}
    first = open_api.post("/api/generate", content='{"prompt": "x", "steps": 3}', headers=headers)
    again = open_api.post("/api/generate", content='{ "steps":3,"prompt":"\\u0078" }', headers=headers)
    assert first.json()["id"] == again.json()["id"]


def test_a_replay_after_the_end_shows_the_end(open_api: Api, key: str) -> None:
    job_id = open_api.submit({"idempotency-key": key}).json()["id"]
    open_api.succeed(job_id)
    again = open_api.submit({"idempotency-key": key})
    assert (again.status_code, again.json()["id"], again.json()["status"]) == (200, job_id, "succeeded")
    assert len(again.json()["outputs"]) == 1


def test_the_same_key_with_another_body_is_refused(open_api: Api, key: str) -> None:
    open_api.submit({"idempotency-key": key}, prompt="one")
    document = problem(open_api.submit({"idempotency-key": key}, prompt="two"), 422, "idempotency_key_reused")
    assert pointers(document) == {"/Idempotency-Key"}


def test_a_refused_request_leaves_its_key_free(open_api: Api, key: str) -> None:
    problem(open_api.submit({"idempotency-key": key}, steps=0), 400, "invalid_request")
    assert open_api.submit({"idempotency-key": key}, steps=1).status_code == 202


def test_ten_at_once_make_one_job(open_api: Api, key: str) -> None:
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: open_api.submit({"idempotency-key": key}), range(10)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1


def test_a_key_is_free_again_after_a_day(open_api: Api, key: str) -> None:
    first = open_api.submit({"idempotency-key": key}, prompt="one").json()["id"]
    with open_api.database.write() as transaction:
        queries.get(transaction, UUID(first)).created_at -= timedelta(hours=24)
    second = open_api.submit({"idempotency-key": key}, prompt="two")
    assert (second.status_code, second.json()["id"] != first) == (202, True)


def test_two_callers_may_use_one_key(keyed_api: Api, key: str) -> None:
    jobs = [keyed_api.as_(owner).submit({"idempotency-key": key}).json()["id"] for owner in ("anna", "ben")]
    assert len(set(jobs)) == 2


@pytest.mark.parametrize("empty", ['""', '" "', "x" * 256])
def test_a_key_is_a_key(open_api: Api, empty: str) -> None:
    problem(open_api.submit({"idempotency-key": empty}), 400, "invalid_request")
