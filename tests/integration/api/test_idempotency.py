"""`Idempotency-Key`: submitting twice creates one job."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from uuid import uuid4

import pytest
from sqlalchemy import select

from tests.integration.api.conftest import Api, named, problem
from zcore.jobs.models import IdempotencyKey


@pytest.fixture
def key() -> str:
    """An unused key."""
    return f"order-{uuid4()}"


def test_the_same_key_and_body_return_the_same_job(open_api: Api, key: str) -> None:
    first = open_api.submit({"idempotency-key": key}, prompt="once")
    again = open_api.submit({"idempotency-key": key}, prompt="once")
    assert first.json()["id"] == again.json()["id"]
    assert first.json()["request"]["seed"] == again.json()["request"]["seed"]
    assert "idempotency-replayed" not in first.headers
    assert (again.status_code, again.headers["idempotency-replayed"]) == (202, "true")


def test_a_key_may_be_quoted_as_in_the_ietf_draft(open_api: Api, key: str) -> None:
    bare = open_api.submit({"idempotency-key": key})
    quoted = open_api.submit({"idempotency-key": f'"{key}"'})
    assert bare.json()["id"] == quoted.json()["id"]


def test_differently_formatted_json_counts_as_the_same_body(open_api: Api, key: str) -> None:
    headers = {"idempotency-key": key, "content-type": "application/json"}
    first = open_api.post("/api/generate", content='{"prompt": "x", "steps": 3}', headers=headers)
    again = open_api.post("/api/generate", content='{ "steps":3,"prompt":"\\u0078" }', headers=headers)
    assert first.json()["id"] == again.json()["id"]


def test_a_replay_after_the_job_ended_returns_the_ended_job(open_api: Api, key: str) -> None:
    job_id = open_api.submit({"idempotency-key": key}).json()["id"]
    open_api.succeed(job_id)
    again = open_api.submit({"idempotency-key": key})
    assert (again.status_code, again.json()["id"], again.json()["status"]) == (200, job_id, "succeeded")
    assert len(again.json()["outputs"]) == 1


def test_the_same_key_with_another_body_is_refused(open_api: Api, key: str) -> None:
    open_api.submit({"idempotency-key": key}, prompt="one")
    document = problem(open_api.submit({"idempotency-key": key}, prompt="two"), 422, "idempotency_key_reused")
    assert named(document) == {("header", "Idempotency-Key")}


def test_a_refused_request_does_not_use_up_its_key(open_api: Api, key: str) -> None:
    problem(open_api.submit({"idempotency-key": key}, steps=0), 400, "invalid_request")
    assert open_api.submit({"idempotency-key": key}, steps=1).status_code == 202


def test_ten_concurrent_submissions_create_one_job(open_api: Api, key: str) -> None:
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: open_api.submit({"idempotency-key": key}), range(10)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1


def test_a_key_expires_after_a_day(open_api: Api, key: str) -> None:
    first = open_api.submit({"idempotency-key": key}, prompt="one").json()["id"]
    with open_api.database.write() as transaction:
        used = transaction.session.scalars(select(IdempotencyKey).where(IdempotencyKey.key == key)).one()
        used.created_at -= timedelta(hours=24)
    second = open_api.submit({"idempotency-key": key}, prompt="two")
    assert (second.status_code, second.json()["id"] != first) == (202, True)


def test_two_callers_may_use_the_same_key(keyed_api: Api, key: str) -> None:
    jobs = [keyed_api.as_(owner).submit({"idempotency-key": key}).json()["id"] for owner in ("anna", "ben")]
    assert len(set(jobs)) == 2


@pytest.mark.parametrize("invalid", ['""', '" "', "x" * 256])
def test_an_empty_or_too_long_key_is_refused(open_api: Api, invalid: str) -> None:
    problem(open_api.submit({"idempotency-key": invalid}), 400, "invalid_request")
