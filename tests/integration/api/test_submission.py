"""`POST /api/generate`: accepted submissions, and how invalid ones are refused."""

import json
import subprocess
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec
import pytest

from tests.integration.api.conftest import Api, pointers, problem
from zcore.jobs import queries
from zcore.request import SEED_BOUND, GenerationRequest

# The exact commands of the product description.
CURL_PLAIN = """
curl -X POST http://localhost:8000/api/generate \\
  -H "Content-Type: application/json" \\
  -d '{
    "prompt": "A cat sleeping",
    "width": 1024,
    "height": 1024,
    "steps": 9,
    "seed": 42
  }'
"""
CURL_TEMPLATE = """
curl -X POST http://localhost:8000/api/generate \\
  -H "Content-Type: application/json" \\
  -d '{
    "prompt": "A sunset",
    "template": "photography"
  }'
"""

REFUSED: list[tuple[str, Any]] = [
    ("prompt", ""),
    ("prompt", "   "),
    ("prompt", 7),
    ("prompt", "x" * 16_385),
    ("prompt", "a\0b"),
    ("template", "no-such-template"),
    ("width", 63),
    ("width", 100),
    ("width", 8208),
    ("width", "1024"),
    ("height", 0),
    ("height", 8200),
    ("steps", 0),
    ("steps", 51),
    ("steps", 8.5),
    ("shift", 0),
    ("shift", 20.1),
    ("seed", -1),
    ("seed", SEED_BOUND),
    ("n", 0),
    ("n", 9),
    ("priority", 11),
    ("webhook_url", "ftp://caller.example/hook"),
    ("webhook_url", "not a url"),
    ("metadata", {"note": "x" * 1024}),
    ("metadata", ["not", "an", "object"]),
    ("colour", "red"),
]


@pytest.mark.parametrize("command", [CURL_PLAIN, CURL_TEMPLATE], ids=["plain", "template"])
def test_the_documented_curl_commands_work_unchanged(open_api: Api, command: str) -> None:
    local = command.replace("http://localhost:8000", open_api.url.replace("127.0.0.1", "localhost"))
    ran = subprocess.run(local, shell=True, capture_output=True, text=True, timeout=60)
    job = json.loads(ran.stdout)
    assert ran.returncode == 0
    assert job["status"] == "queued"
    assert job["request"]["prompt"] in ("A cat sleeping", "A sunset")


def test_an_accepted_job_has_its_address_and_a_polling_delay(open_api: Api) -> None:
    answer = open_api.submit(prompt="a lighthouse", width=128, height=64, steps=3, seed=7, n=2, metadata={"order": 1})
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/api/jobs/{job['id']}"
    assert int(answer.headers["retry-after"]) >= 1
    assert job["status"] == "queued"
    assert job["queue_position"] >= 1
    assert job["metadata"] == {"order": 1}
    given = {"prompt": "a lighthouse", "width": 128, "height": 64, "steps": 3, "seed": 7, "n": 2}
    assert job["request"] == msgspec.json.decode(msgspec.json.encode(GenerationRequest(**given))), (
        "every field is decided and stored"
    )
    assert job["urls"] == {
        "self": f"{open_api.url}/api/jobs/{job['id']}",
        "cancel": f"{open_api.url}/api/jobs/{job['id']}/cancel",
    }
    created_at = datetime.fromisoformat(job["created_at"])
    assert created_at.tzinfo is not None
    assert abs((created_at - datetime.now(UTC)).total_seconds()) < 60


def test_the_job_is_stored_before_it_is_answered(open_api: Api) -> None:
    job_id = open_api.submit(webhook_url="https://caller.example/hook").json()["id"]
    with open_api.database.read() as transaction:
        assert queries.get(transaction, UUID(job_id)).webhook_url == "https://caller.example/hook"


def test_a_missing_seed_is_chosen_at_random(open_api: Api) -> None:
    seeds = [open_api.submit().json()["request"]["seed"] for _ in range(2)]
    assert len(set(seeds)) == 2
    assert all(0 <= seed < 2**53 for seed in seeds), "every JSON parser represents these numbers exactly"


def test_omitted_fields_come_from_the_settings(open_api: Api) -> None:
    request = open_api.submit().json()["request"]
    assert (request["width"], request["height"], request["steps"]) == (128, 128, 8)  # the demo profile


def test_the_smallest_and_largest_values_are_accepted(open_api: Api) -> None:
    smallest = open_api.submit(prompt="x", width=64, height=64, steps=1, shift=0.1, seed=0, n=1, priority=-10)
    largest = open_api.submit(width=8192, height=128, steps=50, shift=20, seed=SEED_BOUND - 1, n=8, priority=10)
    assert (smallest.status_code, largest.status_code) == (202, 202), (smallest.text, largest.text)
    assert largest.json()["request"]["seed"] == SEED_BOUND - 1


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=[f"{name}={str(value)[:20]!r}" for name, value in REFUSED])
def test_an_invalid_field_is_refused_by_name(open_api: Api, name: str, value: Any) -> None:
    document = problem(open_api.submit(**{name: value}), 400, "invalid_request")
    assert pointers(document) == {f"/{name}"}


def test_more_pixels_than_the_configured_limit_are_refused(open_api: Api) -> None:
    document = problem(open_api.submit(width=2048, height=1024), 400, "invalid_request")
    assert pointers(document) == {"/width", "/height"}
    assert "1048576" in document["detail"]


def test_a_prompt_with_too_many_tokens_is_refused(open_api: Api) -> None:
    document = problem(open_api.submit(prompt="zq " * 5_000, long_prompt_mode="refuse"), 400, "prompt_too_long")
    assert pointers(document) == {"/prompt"}


def test_all_invalid_fields_are_named_at_once(open_api: Api) -> None:
    answer = open_api.submit(width=100, steps=0, n=9, webhook_url="ftp://x", colour="red", metadata=[])
    document = problem(answer, 400, "invalid_request")
    assert pointers(document) == {"/width", "/steps", "/n", "/webhook_url", "/colour", "/metadata"}


def test_a_refused_submission_is_not_stored(open_api: Api) -> None:
    open_api.submit(prompt="never to be stored", steps=0)
    assert open_api.get("/api/jobs", params={"text": "never to be stored"}).json()["jobs"] == []


@pytest.mark.parametrize(
    "body",
    ["", "{", '{"prompt": }', '"text"', "[1, 2]", "null", '{"prompt": "x", "metadata": {"a": 1e400}}', "\xff"],
)
def test_a_body_that_is_not_a_json_object_is_refused(open_api: Api, body: str) -> None:
    answer = open_api.post(
        "/api/generate", content=body.encode("latin-1"), headers={"content-type": "application/json"}
    )
    problem(answer, 400, "invalid_request")


def test_a_deeply_nested_body_is_refused(open_api: Api) -> None:
    body = '{"prompt": "x", "metadata": {"a": ' + "[" * 50_000 + "]" * 50_000 + "}}"
    answer = open_api.post("/api/generate", content=body, headers={"content-type": "application/json"})
    problem(answer, 400, "invalid_request")


def test_a_body_above_one_mebibyte_is_refused(open_api: Api) -> None:
    body = json.dumps({"prompt": "x" * 1_100_000})
    answer = open_api.post("/api/generate", content=body, headers={"content-type": "application/json"})
    problem(answer, 413, "body_too_large")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_another_media_type_is_refused(open_api: Api, kind: str) -> None:
    answer = open_api.post("/api/generate", content='{"prompt": "x"}', headers={"content-type": kind})
    problem(answer, 415, "unsupported_media_type")


def test_the_media_type_may_have_a_charset(open_api: Api) -> None:
    answer = open_api.post(
        "/api/generate", content='{"prompt": "x"}', headers={"content-type": "Application/JSON; charset=utf-8"}
    )
    assert answer.status_code == 202


def test_unknown_paths_and_methods_are_problems(open_api: Api) -> None:
    problem(open_api.get("/api/nowhere"), 404, "not_found")
    problem(open_api.get("/api/jobs/not-an-id"), 404, "not_found")
    refused = open_api.post("/api/jobs")
    problem(refused, 405, "method_not_allowed")
    assert "GET" in refused.headers["allow"]
