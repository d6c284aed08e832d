"""Jobs after submission: waiting, polling, listing, canceling, fetching images."""

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from uuid import UUID, uuid4

import httpx
import pytest

from tests.integration.api.conftest import Api, named, problem
from tests.waiting import wait_until
from zcore.jobs import claims, lifecycle, queries, recovery
from zcore.jobs.models import Job

IMAGE = b"\x89PNG" + bytes(5_000)


def test_a_wait_ends_when_the_job_ends(open_api: Api) -> None:
    prompt = f"waited for {uuid4()}"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: open_api.submit({"prefer": "respond-async, wait=50"}, prompt=prompt))
        listed = lambda: open_api.get("/api/jobs", params={"text": prompt}).json()["jobs"]  # noqa: E731
        job_id = wait_until(listed)[0]["id"]
        assert not waiting.done()
        open_api.succeed(job_id)
        answer = waiting.result()
    assert answer.status_code == 200
    assert answer.headers["preference-applied"] == "wait=50"
    assert "retry-after" not in answer.headers
    assert (answer.json()["id"], answer.json()["status"]) == (job_id, "succeeded")


def test_a_wait_that_times_out_returns_the_unfinished_job(open_api: Api) -> None:
    answer = open_api.submit({"prefer": "wait=1"})
    assert (answer.status_code, answer.headers["preference-applied"]) == (202, "wait=1")
    assert answer.json()["status"] == "queued"


def test_a_wait_is_limited_to_one_minute(open_api: Api) -> None:
    with ThreadPoolExecutor(1) as pool:
        prompt = f"limited {uuid4()}"
        waiting = pool.submit(lambda: open_api.submit({"prefer": "wait=86400"}, prompt=prompt))
        job = wait_until(lambda: open_api.get("/api/jobs", params={"text": prompt}).json()["jobs"])[0]
        open_api.post(job["urls"]["cancel"])
        assert waiting.result().headers["preference-applied"] == "wait=60"


def test_an_unknown_preference_is_ignored(open_api: Api) -> None:
    answer = open_api.submit({"prefer": "handling=lenient; wait=x"})
    assert answer.status_code == 202
    assert "preference-applied" not in answer.headers


def test_disconnecting_during_a_wait_cancels_nothing(open_api: Api) -> None:
    prompt = f"abandoned {uuid4()}"
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{open_api.url}/api/generate",
            json={"prompt": prompt},
            headers={"prefer": "wait=50"},
            timeout=httpx.Timeout(10, read=0.5),
        )
    job = wait_until(lambda: open_api.get("/api/jobs", params={"text": prompt}).json()["jobs"])[0]
    assert (job["status"], job["cancel_requested_at"]) == ("queued", None)


def test_a_job_is_reported_in_every_state(open_api: Api) -> None:
    queued = open_api.submit().json()
    shown = open_api.get(queued["urls"]["self"])
    assert (shown.status_code, shown.json()["status"], shown.headers["retry-after"]) == (200, "queued", "1")

    lease = open_api.claim(queued["id"])
    with open_api.database.write() as transaction:
        claims.heartbeat(transaction, lease, 60, ("denoise", 3, 8))
    running = open_api.get(queued["urls"]["self"]).json()
    assert (running["status"], running["attempt"], running["queue_position"]) == ("running", 1, None)
    assert running["progress"] == {"phase": "denoise", "step": 3, "steps": 8, "fraction": 0.375}

    failed = open_api.submit().json()
    open_api.fail(failed["id"])
    ended = open_api.get(failed["urls"]["self"])
    assert ended.json()["error"] == {"code": "model_unavailable", "message": "a file is missing", "retryable": False}
    assert "retry-after" not in ended.headers

    done = open_api.submit().json()
    open_api.succeed(done["id"], IMAGE)
    succeeded = open_api.get(done["urls"]["self"]).json()
    (output,) = succeeded["outputs"]
    assert (output["index"], output["bytes"], output["seed"]) == (0, len(IMAGE), 42)
    assert open_api.get(output["url"]).content == IMAGE
    assert datetime.fromisoformat(output["expires_at"]) > datetime.fromisoformat(succeeded["completed_at"])


def test_an_unknown_job_is_not_found(open_api: Api) -> None:
    unknown = f"/api/jobs/{uuid4()}"
    problem(open_api.get(unknown), 404, "not_found")
    problem(open_api.post(f"{unknown}/cancel"), 404, "not_found")
    problem(open_api.get(f"{unknown}/outputs/0"), 404, "not_found")


def test_a_queued_job_is_canceled_immediately_and_canceling_again_changes_nothing(open_api: Api) -> None:
    job = open_api.submit().json()
    first = open_api.post(job["urls"]["cancel"])
    again = open_api.post(job["urls"]["cancel"])
    assert (first.status_code, first.json()["status"]) == (200, "canceled")
    assert first.json() == again.json()


def test_canceling_a_running_job_records_a_cancellation_request(open_api: Api) -> None:
    job = open_api.submit().json()
    lease = open_api.claim(job["id"])
    answer = open_api.post(job["urls"]["cancel"]).json()
    assert (answer["status"], answer["cancel_requested_at"] is not None) == ("running", True)
    with open_api.database.write() as transaction:
        lifecycle.acknowledge_cancel(transaction, lease)
    assert open_api.get(job["urls"]["self"]).json()["status"] == "canceled"


def test_canceling_an_ended_job_changes_nothing(open_api: Api) -> None:
    job = open_api.submit().json()
    open_api.succeed(job["id"])
    answer = open_api.post(job["urls"]["cancel"])
    assert (answer.status_code, answer.json()["status"], answer.json()["cancel_requested_at"]) == (
        200,
        "succeeded",
        None,
    )


def test_an_image_is_reached_through_its_job(open_api: Api) -> None:
    job = open_api.submit().json()
    open_api.succeed(job["id"], IMAGE)
    redirect = open_api.get(f"/api/jobs/{job['id']}/outputs/0")
    assert redirect.status_code == 302
    assert open_api.get(redirect.headers["location"]).content == IMAGE
    problem(open_api.get(f"/api/jobs/{job['id']}/outputs/1"), 404, "not_found")


def test_images_past_their_retention_time_are_gone(open_api: Api) -> None:
    job = open_api.submit().json()
    open_api.succeed(job["id"], retention_s=0)
    with open_api.database.write() as transaction:
        assert recovery.expire(transaction, UUID(job["id"])) is not None
    problem(open_api.get(f"/api/jobs/{job['id']}/outputs/0"), 410, "gone")
    expired = open_api.get(job["urls"]["self"]).json()
    assert (expired["status"], expired["outputs"][0]["url"]) == ("expired", None)


@pytest.fixture
def listed(keyed_api: Api) -> list[Job]:
    """Seven jobs of one caller, oldest first: two are canceled, one contains `100%_fox`."""
    anna = keyed_api.as_("anna")
    marker = f"marker-{uuid4().hex}"
    jobs = [anna.submit(prompt=f"{marker} number {index}" + " 100%_fox" * (index == 4)).json() for index in range(7)]
    for job in jobs[:2]:
        anna.post(job["urls"]["cancel"])
    with keyed_api.database.read() as transaction:
        return [queries.get(transaction, UUID(job["id"])) for job in jobs]


def ids(jobs: list[Job]) -> list[str]:
    """Return the job ids, newest first."""
    return [str(job.id) for job in reversed(jobs)]


def test_next_links_lead_through_the_whole_list_newest_first(keyed_api: Api, listed: list[Job]) -> None:
    anna = keyed_api.as_("anna")
    url: str | None = f"{keyed_api.url}/api/jobs?limit=3&text={listed[0].prompt.split()[0]}"
    found, sizes = [], []
    while url is not None:
        page = anna.get(url).json()
        sizes.append(len(page["jobs"]))
        found += [job["id"] for job in page["jobs"]]
        assert (page["next"] is None) == (page["next_cursor"] is None)
        url = page["next"]
    assert sizes == [3, 3, 1]
    assert found == ids(listed)


def test_a_new_job_does_not_shift_the_pages(keyed_api: Api, listed: list[Job]) -> None:
    anna = keyed_api.as_("anna")
    first = anna.get("/api/jobs", params={"limit": 3}).json()
    anna.submit()
    second = anna.get("/api/jobs", params={"limit": 3, "cursor": first["next_cursor"]}).json()
    assert [job["id"] for job in first["jobs"] + second["jobs"]] == ids(listed)[:6]


def test_lists_are_filtered_by_status_text_and_time(keyed_api: Api, listed: list[Job]) -> None:
    anna = keyed_api.as_("anna")
    marker = listed[0].prompt.split()[0]

    def found(**filters: str) -> list[str]:
        return [job["id"] for job in anna.get("/api/jobs", params={"text": marker, **filters}).json()["jobs"]]

    assert found(status="canceled") == ids(listed[:2])
    assert found(text=f"{marker} NUMBER 4 100%_fox") == ids(listed[4:5])
    assert found(text=f"3 {marker[:-1]}") == ids(listed[3:4])
    assert found(text="%") == [], "there is no word in it"
    assert found(text=str(listed[3].id)) == ids(listed[3:4])
    assert found(created_from=listed[6].created_at.isoformat()) == ids(listed[6:])
    assert found(created_before=listed[2].created_at.isoformat()) == ids(listed[:2])


@pytest.mark.parametrize(
    ("name", "value", "detail"),
    [
        ("limit", "0", "must be at least 1"),
        ("limit", "201", "must be at most 200"),
        ("limit", "many", "must be a whole number"),
        ("status", "lost", "'lost' is not an allowed value"),
        ("cursor", "!!", ""),
        ("cursor", "AAAA", ""),
        ("created_from", "", "must be an ISO 8601 date and time"),
        ("created_from", "yesterday", "must be an ISO 8601 date and time, such as 2030-01-31T18:00:00Z"),
        ("text", "x" * 201, "must have at most 200 characters"),
        ("text", "a\0b", "must not contain"),
        ("created_from", "2020", "must be an ISO 8601 date and time"),
        ("created_before", "0.5", "must be an ISO 8601 date and time"),
        ("state", "failed", "is not a known parameter; did you mean `status`?"),
        ("sort", "asc", "is not a known parameter"),
    ],
)
def test_an_invalid_list_parameter_is_refused_by_name(open_api: Api, name: str, value: str, detail: str) -> None:
    document = problem(open_api.get("/api/jobs", params={name: value}), 400, "invalid_request")
    assert named(document) == {("query", name)}
    assert detail in document["errors"][0]["detail"]
