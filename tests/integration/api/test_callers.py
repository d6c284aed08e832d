"""Who is let in, and whose jobs they see."""

import pytest

from tests.integration.api.conftest import KEYS, Api, problem


@pytest.mark.parametrize("path", ["/api/jobs", "/api/jobs/01920000-0000-7000-8000-000000000000"])
@pytest.mark.parametrize(
    "given", [{}, {"authorization": "Bearer wrong"}, {"authorization": KEYS["anna"]}, {"authorization": "Basic x"}]
)
def test_without_a_valid_key_nothing_is_answered(keyed_api: Api, path: str, given: dict[str, str]) -> None:
    answer = keyed_api.get(path, headers=given)
    problem(answer, 401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_without_a_valid_key_nothing_is_stored(keyed_api: Api) -> None:
    problem(keyed_api.submit(prompt="a stranger's wish"), 401, "unauthorized")
    assert keyed_api.as_("anna").get("/api/jobs", params={"text": "a stranger's wish"}).json()["jobs"] == []


def test_health_needs_no_key(keyed_api: Api) -> None:
    assert keyed_api.get("/health/live").status_code == 200
    assert keyed_api.get("/health/ready").status_code == 200


def test_anothers_job_is_not_there(keyed_api: Api) -> None:
    anna, ben = keyed_api.as_("anna"), keyed_api.as_("ben")
    job = anna.submit(prompt="anna's own").json()
    keyed_api.succeed(job["id"])
    assert anna.get(f"/api/jobs/{job['id']}").status_code == 200
    problem(ben.get(f"/api/jobs/{job['id']}"), 404, "not_found")
    problem(ben.get(f"/api/jobs/{job['id']}/outputs/0"), 404, "not_found")
    assert ben.get("/api/jobs", params={"text": "anna's own"}).json()["jobs"] == []
    assert ben.get("/api/jobs", params={"text": job["id"]}).json()["jobs"] == []


def test_anothers_job_cannot_be_canceled(keyed_api: Api) -> None:
    job = keyed_api.as_("anna").submit().json()
    problem(keyed_api.as_("ben").post(f"/api/jobs/{job['id']}/cancel"), 404, "not_found")
    assert keyed_api.as_("anna").get(job["urls"]["self"]).json()["status"] == "queued"


@pytest.mark.parametrize(
    "header", [{"x-forwarded-for": "127.0.0.1"}, {"forwarded": "for=127.0.0.1"}, {"x-forwarded-for": "203.0.113.7"}]
)
def test_without_keys_a_forwarded_caller_is_not_a_local_one(open_api: Api, header: dict[str, str]) -> None:
    problem(open_api.get("/api/jobs", headers=header), 401, "unauthorized")


@pytest.mark.parametrize("name", ["rebound.example", "rebound.example:8000", "127.0.0.1.example", ""])
def test_without_keys_a_page_of_another_site_is_not_a_local_caller(open_api: Api, name: str) -> None:
    problem(open_api.get("/api/jobs", headers={"host": name}), 401, "unauthorized")


@pytest.mark.parametrize("name", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000"])
def test_without_keys_every_name_of_this_machine_is_local(open_api: Api, name: str) -> None:
    assert open_api.get("/api/jobs", headers={"host": name}).status_code == 200


def test_a_forwarded_caller_with_a_key_is_let_in(keyed_api: Api) -> None:
    assert keyed_api.as_("anna").get("/api/jobs", headers={"x-forwarded-for": "203.0.113.7"}).status_code == 200
