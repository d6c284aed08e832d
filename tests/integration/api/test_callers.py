"""Authentication of callers, and isolation of their jobs."""

from pathlib import Path

import pytest
from litestar.testing import TestClient

from server.app import create_app
from server.key_guesses import MAX_WRONG_KEYS
from tests.integration.api.conftest import KEYS, Api, problem
from tests.integration.installation import Installation
from zcore.keys import load_keys


@pytest.mark.parametrize("path", ["/api/jobs", "/api/jobs/01920000-0000-7000-8000-000000000000"])
@pytest.mark.parametrize(
    "given", [{}, {"authorization": "Bearer wrong"}, {"authorization": KEYS["anna"]}, {"authorization": "Basic x"}]
)
def test_a_request_without_a_valid_key_is_refused(keyed_api: Api, path: str, given: dict[str, str]) -> None:
    answer = keyed_api.get(path, headers=given)
    problem(answer, 401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_a_submission_without_a_valid_key_is_not_stored(keyed_api: Api) -> None:
    problem(keyed_api.submit(prompt="an unauthorized prompt"), 401, "unauthorized")
    assert keyed_api.as_("anna").get("/api/jobs", params={"text": "an unauthorized prompt"}).json()["jobs"] == []


def test_health_needs_no_key(keyed_api: Api) -> None:
    assert keyed_api.get("/health/live").status_code == 200
    assert keyed_api.get("/health/ready").status_code == 200


def test_a_job_of_another_caller_is_not_found(keyed_api: Api) -> None:
    anna, ben = keyed_api.as_("anna"), keyed_api.as_("ben")
    job = anna.submit(prompt="anna's own").json()
    keyed_api.succeed(job["id"])
    assert anna.get(f"/api/jobs/{job['id']}").status_code == 200
    problem(ben.get(f"/api/jobs/{job['id']}"), 404, "not_found")
    problem(ben.get(f"/api/jobs/{job['id']}/outputs/0"), 404, "not_found")
    assert ben.get("/api/jobs", params={"text": "anna's own"}).json()["jobs"] == []
    assert ben.get("/api/jobs", params={"text": job["id"]}).json()["jobs"] == []


def test_a_job_of_another_caller_cannot_be_canceled(keyed_api: Api) -> None:
    job = keyed_api.as_("anna").submit().json()
    problem(keyed_api.as_("ben").post(f"/api/jobs/{job['id']}/cancel"), 404, "not_found")
    assert keyed_api.as_("anna").get(job["urls"]["self"]).json()["status"] == "queued"


def test_a_forwarded_request_with_a_key_is_accepted(keyed_api: Api) -> None:
    assert keyed_api.as_("anna").get("/api/jobs", headers={"x-forwarded-for": "203.0.113.7"}).status_code == 200


@pytest.mark.parametrize(("method", "path"), [("GET", "/api/jobs"), ("DELETE", "/api/loras/x")])
def test_guessing_keys_is_answered_with_the_time_to_wait(
    sqlite_url: str, tmp_path: Path, method: str, path: str
) -> None:
    """For API keys and the admin key alike; a request without a key is no guess."""
    installation = Installation(tmp_path, {"database.url": sqlite_url, "server.keyless": False})
    keys = load_keys(installation.settings)
    right = {"/api/jobs": keys.api["local"], "/api/loras/x": keys.admin}[path]
    with TestClient(create_app(installation.settings)) as client:

        def status(key: str) -> int:
            return client.request(method, path, headers={"authorization": f"Bearer {key}"}).status_code

        assert client.request(method, path).status_code == 401
        assert [status(f"guess {number}") for number in range(MAX_WRONG_KEYS)] == [401] * MAX_WRONG_KEYS
        refused = client.request(method, path, headers={"authorization": f"Bearer {right}"})
        assert (refused.status_code, refused.json()["code"]) == (429, "too_many_wrong_keys")
        assert 0 < int(refused.headers["retry-after"]) <= 60
        assert client.get("/health/live").status_code == 200


def test_the_generated_key_is_accepted_and_a_keyless_request_is_not(sqlite_url: str, tmp_path: Path) -> None:
    installation = Installation(tmp_path, {"database.url": sqlite_url, "server.keyless": False})
    with TestClient(create_app(installation.settings)) as client:
        assert client.get("/api/jobs").status_code == 401
        key = (tmp_path / "keys" / "api").read_text()
        assert client.get("/api/jobs", headers={"authorization": f"Bearer {key}"}).status_code == 200
