"""What holds for every answer: HEAD and OPTIONS, its headers, strict parameters, and work off the event loop."""

import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from server import bodies
from server.prompt_check import PromptCheck
from server.routes import jobs as jobs_route
from tests.integration.edge.conftest import AUTHORIZATION, Served, Serving

NO_JOB = "01920000-0000-7000-8000-000000000000"
READABLE = [
    "/health/live",
    "/health/ready",
    "/api/jobs",
    f"/api/jobs/{NO_JOB}",
    f"/api/jobs/{NO_JOB}/outputs/0",
    "/api/templates",
    "/api/templates/photography",
    "/api/sizes",
    "/api/loras",
    "/files/jobs/x?expires=1&disposition=inline&signature=x",
    "/schema/openapi.json",
    "/playground",
    "/admin",
    "/admin/sign-in",
    "/admin/assets/style.css",
    "/nowhere",
]
VARYING = {"date", "x-request-id", "set-cookie"}


@pytest.mark.parametrize("path", READABLE)
def test_head_is_get_without_the_body(client: httpx.Client, path: str) -> None:
    got, headed = client.get(path), client.head(path)
    assert headed.status_code == got.status_code
    assert headed.content == b""
    # A document that contains its request's id may differ in nothing but that.
    assert {**headed.headers, **dict.fromkeys(VARYING)} == {**got.headers, **dict.fromkeys(VARYING)}
    if got.content:
        assert headed.headers["content-length"] == str(len(got.content))


def test_a_connection_continues_after_head(served: Served) -> None:
    with httpx.Client(base_url=served.url) as one, one.stream("HEAD", "/health/live") as first:
        stream = first.extensions["network_stream"].get_extra_info("client_addr")
        first.read()
        with one.stream("GET", "/health/live") as second:
            assert second.extensions["network_stream"].get_extra_info("client_addr") == stream
            assert json.loads(second.read()) == {"status": "ok"}


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/api/loras", "GET, HEAD, OPTIONS, POST"),
        ("/api/loras/night", "DELETE, OPTIONS"),
        ("/api/generate", "OPTIONS, POST"),
        ("/api/jobs", "GET, HEAD, OPTIONS"),
        ("/health/live", "GET, HEAD, OPTIONS"),
        ("/admin/sign-in", "GET, HEAD, OPTIONS, POST"),
    ],
)
def test_options_and_a_refused_method_list_every_method_of_the_path(
    client: httpx.Client, path: str, methods: str
) -> None:
    asked, refused = client.options(path), client.patch(path)
    assert (asked.status_code, asked.content, asked.headers["allow"]) == (204, b"", methods)
    assert (refused.status_code, refused.headers["allow"]) == (405, methods)
    assert client.options("/nowhere").status_code == 404


@pytest.mark.parametrize("path", READABLE)
def test_every_answer_has_an_id_and_is_neither_guessed_at_nor_stored(client: httpx.Client, path: str) -> None:
    answer = client.get(path, headers={"x-request-id": "order-7"})
    assert answer.headers["x-request-id"] == "order-7"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "server" not in answer.headers
    if path != "/admin/assets/style.css":
        assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("unsafe", ["", "a b", "x" * 129, "<script>", '"', "-"])
def test_an_unsafe_request_id_is_replaced(client: httpx.Client, unsafe: str) -> None:
    ids = [client.get("/health/live", headers={"x-request-id": unsafe}).headers["x-request-id"] for _ in range(2)]
    assert unsafe not in ids
    assert len(set(ids)) == 2


@pytest.mark.parametrize(
    ("method", "path", "known"),
    [
        ("GET", "/api/jobs?stauts=failed", "status"),
        ("GET", "/api/templates?categroy=x", "category"),
        ("POST", "/api/loras?name=x&licence=x&license=x", "licence"),
        ("GET", "/api/sizes?x=1", None),
        ("GET", "/health/live?x=1", None),
        ("GET", f"/api/jobs/{NO_JOB}?wait=1", None),
        ("POST", "/api/generate?wait=30", None),
    ],
)
def test_an_unknown_query_parameter_is_refused(client: httpx.Client, method: str, path: str, known: str | None) -> None:
    given = path.rpartition("&")[2].rpartition("?")[2].partition("=")[0]
    answer = client.request(method, path)
    assert answer.status_code == 400
    (error,) = answer.json()["errors"]
    assert (error["in"], error["name"]) == ("query", given)
    assert ("did you mean" in error["detail"]) == (known is not None)
    assert known is None or f"`{known}`" in error["detail"]


def test_a_repeated_and_a_missing_parameter_are_refused(client: httpx.Client) -> None:
    repeated = client.get("/api/jobs?status=queued&status=failed").json()["errors"]
    assert repeated == [{"in": "query", "name": "status", "detail": "must be given only once"}]
    missing = client.post("/api/loras?name=x").json()["errors"]
    assert missing == [{"in": "query", "name": "licence", "detail": "is required"}]


@pytest.mark.parametrize("word", ["null", "NULL"])
def test_the_word_null_is_no_value_unless_any_text_is(client: httpx.Client, word: str) -> None:
    (error,) = client.get(f"/api/jobs?status={word}").json()["errors"]
    assert error == {"in": "query", "name": "status", "detail": "must not be null; leave the parameter out"}
    assert client.get(f"/api/jobs?text={word}").status_code == 200


def test_pages_ignore_parameters_that_other_sites_append(client: httpx.Client) -> None:
    assert client.get("/playground?utm_source=letter").status_code == 200
    assert client.get("/admin/sign-in?fbclid=x").status_code == 200


def test_a_wrong_header_is_named(client: httpx.Client) -> None:
    body = {"prompt": "a fox"}
    long = client.post("/api/generate", json=body, headers={"idempotency-key": "k" * 256})
    assert [(one["in"], one["name"]) for one in long.json()["errors"]] == [("header", "idempotency-key")]
    packed = client.post("/api/generate", json=body, headers={"content-encoding": "gzip"})
    assert (packed.status_code, packed.headers["accept-encoding"]) == (415, "identity")
    assert [(one["in"], one["name"]) for one in packed.json()["errors"]] == [("header", "Content-Encoding")]
    assert client.post("/api/generate", json=body, headers={"content-encoding": "identity"}).status_code == 202


def test_a_large_seed_survives_a_client_without_64_bit_integers(client: httpx.Client) -> None:
    job = client.post("/api/generate", json={"prompt": "a fox", "seed": "9007199254740993"}).json()
    assert (job["request"]["seed"], job["seed_text"]) == (9007199254740993, "9007199254740993")
    again = client.post("/api/generate", json={"prompt": "a fox", "seed": job["seed_text"]}).json()
    assert again["request"] == job["request"]


def test_the_list_shows_the_position_of_each_queued_job(serving: Serving) -> None:
    with serving() as running, httpx.Client(base_url=running.url, headers=AUTHORIZATION) as client:
        ids = [client.post("/api/generate", json={"prompt": "x", "priority": one}).json()["id"] for one in (0, 5, 0)]
        client.post(f"/api/jobs/{ids[0]}/cancel")
        listed = {job["id"]: job["queue_position"] for job in client.get("/api/jobs").json()["jobs"]}
        assert listed == {ids[0]: None, ids[1]: 1, ids[2]: 2}


def test_bodies_are_parsed_and_checked_off_the_event_loop(
    served: Served, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body that takes seconds to parse, or a prompt to tokenize, must not hold up the health check."""
    threads: dict[str, threading.Thread] = {}

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def record(*arguments: Any) -> Any:
            threads[name] = threading.current_thread()
            return function(*arguments)

        return record

    monkeypatch.setattr(bodies, "parse_object", recorded("parse_object", bodies.parse_object))
    monkeypatch.setattr(jobs_route, "parse_submission", recorded("parse_submission", jobs_route.parse_submission))
    monkeypatch.setattr(jobs_route, "fingerprint_of", recorded("fingerprint_of", jobs_route.fingerprint_of))
    monkeypatch.setattr(PromptCheck, "check", recorded("check", PromptCheck.check))
    assert client.post("/api/generate", json={"prompt": "a fox"}).status_code == 202
    assert threads.keys() == {"parse_object", "parse_submission", "fingerprint_of", "check"}
    assert served.thread not in threads.values()
