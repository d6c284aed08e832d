"""Pictures that jobs start from: uploading them, and naming them in a submission."""

import hashlib
import io
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import httpx
import pytest
from litestar.testing import TestClient
from PIL import Image

from server.app import create_app
from server.routes import inputs as inputs_route
from tests.integration.api.conftest import KEYS, Api, pointers, problem
from tests.integration.installation import Installation
from zcore.imaging.input_picture import open_picture
from zcore.jobs import queries
from zcore.jobs.inputs import key_of
from zcore.jobs.models import Input
from zcore.settings import load_settings

DAY = timedelta(days=1)


def picture(colour: str = "teal", kind: str = "png", size: tuple[int, int] = (48, 32)) -> bytes:
    """A file of a picture in one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


COLOURS = ("red", "green", "blue", "teal", "gold", "navy")


def upload(api: Api, content: bytes, kind: str = "image/png") -> httpx.Response:
    """One upload, as curl's `--data-binary` sends it."""
    return api.post("/api/inputs", content=content, headers={"content-type": kind})


def age(api: Api, input_id: str, change: Callable[[datetime], datetime]) -> None:
    """Moves the end of an upload's time."""
    with api.database.write() as transaction:
        for row in transaction.session.query(Input).filter(Input.sha256 == input_id.removeprefix("input:")):
            row.expires_at = change(row.expires_at)


@pytest.mark.parametrize(
    ("kind", "said"), [("png", "image/png"), ("jpeg", "image/jpeg"), ("webp", "application/octet-stream")]
)
def test_an_upload_is_answered_with_its_id_and_what_it_is(open_api: Api, kind: str, said: str) -> None:
    content = picture("navy", kind)
    answer = upload(open_api, content, said)
    assert answer.status_code == 201, answer.text
    told = answer.json()
    expires_at = datetime.fromisoformat(told.pop("expires_at"))
    assert abs(expires_at - datetime.now(UTC) - DAY) < timedelta(minutes=1)
    sha256 = hashlib.sha256(content).hexdigest()
    assert told == {"id": f"input:{sha256}", "width": 48, "height": 32, "format": kind, "bytes": len(content)}
    assert (open_api.installation.folder / "storage" / key_of("local", sha256)).read_bytes() == content


def test_the_size_is_that_of_the_upright_picture(open_api: Api) -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (48, 32)).save(buffer, "jpeg", exif=exif)
    told = upload(open_api, buffer.getvalue(), "image/jpeg").json()
    assert (told["width"], told["height"]) == (32, 48)


def test_the_same_bytes_again_have_the_same_id_and_are_kept_for_longer(open_api: Api) -> None:
    first = upload(open_api, picture("olive")).json()
    again = upload(open_api, picture("olive")).json()
    assert again["id"] == first["id"]
    assert datetime.fromisoformat(again["expires_at"]) > datetime.fromisoformat(first["expires_at"])


def test_an_upload_never_shortens_the_time_of_an_earlier_one(open_api: Api) -> None:
    first = upload(open_api, picture("plum")).json()
    age(open_api, first["id"], lambda end: end + 2 * DAY)
    again = upload(open_api, picture("plum")).json()
    assert datetime.fromisoformat(again["expires_at"]) == datetime.fromisoformat(first["expires_at"]) + 2 * DAY


@pytest.mark.parametrize(
    "content", [b"", b"not a picture", picture()[:60], b"<svg xmlns='http://www.w3.org/2000/svg'/>"]
)
def test_what_is_no_whole_picture_is_refused_and_not_kept(open_api: Api, content: bytes) -> None:
    document = problem(upload(open_api, content), 400, "invalid_request")
    assert pointers(document) == {"/image"}
    address = f"input:{hashlib.sha256(content).hexdigest()}"
    problem(open_api.submit(image=address), 400, "invalid_request")


@pytest.mark.parametrize(
    "kind", ["multipart/form-data", "text/plain", "application/x-www-form-urlencoded", "application/json", "image/", ""]
)
def test_what_a_form_of_another_site_could_post_is_refused(open_api: Api, kind: str) -> None:
    document = problem(upload(open_api, picture(), kind), 415, "unsupported_media_type")
    assert "image/* or application/octet-stream" in document["detail"]


def test_a_page_of_another_site_gets_no_leave_to_upload(open_api: Api) -> None:
    asked = {"origin": "https://other.example", "access-control-request-method": "POST"}
    answer = open_api.client.options(f"{open_api.url}/api/inputs", headers=asked)
    assert not [name for name in answer.headers if name.startswith("access-control")]
    rebound = {"host": "other.example", "content-type": "image/png"}
    problem(open_api.post("/api/inputs", content=picture(), headers=rebound), 401, "unauthorized")


def test_a_file_may_be_as_large_as_the_operator_says_and_no_larger(tmp_path: Path, sqlite_url: str) -> None:
    content = picture("red")
    installation = Installation(tmp_path, {"database.url": sqlite_url, "limits.max_input_bytes": len(content)})
    with installation.serving() as server:
        headers = {"content-type": "image/png"}
        taken = httpx.post(f"{server.url}/api/inputs", content=content, headers=headers)
        assert taken.status_code == 201, taken.text
        problem(httpx.post(f"{server.url}/api/inputs", content=content + b"\0", headers=headers), 413, "body_too_large")
        unannounced = iter([content, b"\0"])
        problem(httpx.post(f"{server.url}/api/inputs", content=unannounced, headers=headers), 413, "body_too_large")


def test_a_body_larger_than_any_submission_is_taken(open_api: Api) -> None:
    content = picture("white", "bmp", (700, 700))
    assert len(content) > 1024 * 1024
    assert upload(open_api, content, "image/bmp").status_code == 201


def test_an_upload_needs_a_key_and_is_its_owners_alone(keyed_api: Api) -> None:
    problem(upload(keyed_api, picture()), 401, "unauthorized")
    address = upload(keyed_api.as_("anna"), picture("gold")).json()["id"]
    assert keyed_api.as_("anna").submit(image=address).status_code == 202
    document = problem(keyed_api.as_("ben").submit(image=address), 400, "invalid_request")
    assert pointers(document) == {"/image"}
    assert upload(keyed_api.as_("ben"), picture("gold")).json()["id"] == address
    assert keyed_api.as_("ben").submit(image=address).status_code == 202


def test_an_upload_that_is_not_there_or_has_expired_is_refused_on_its_field(open_api: Api) -> None:
    address = upload(open_api, picture("pink")).json()["id"]
    document = problem(open_api.submit(image=address, mask=f"input:{'0' * 64}"), 400, "invalid_request")
    assert document["errors"] == [
        {"pointer": "/mask", "detail": "is no upload that is still kept; POST it to /api/inputs"}
    ]
    age(open_api, address, lambda end: end - DAY - timedelta(seconds=1))
    document = problem(open_api.submit(image=address), 400, "invalid_request")
    assert "expired at" in document["detail"]
    upload(open_api, picture("pink"))
    assert open_api.submit(image=address).status_code == 202


def test_a_repeated_submission_is_answered_although_its_upload_has_expired(open_api: Api) -> None:
    address = upload(open_api, picture("tan")).json()["id"]
    key = {"idempotency-key": "from-an-upload"}
    first = open_api.submit(headers=key, image=address)
    age(open_api, address, lambda end: end - 2 * DAY)
    again = open_api.submit(headers=key, image=address)
    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])


def test_a_picture_of_ones_own_job_is_taken(open_api: Api) -> None:
    job_id = open_api.submit().json()["id"]
    open_api.succeed(job_id)
    assert open_api.submit(image=f"output:{job_id}/0").status_code == 202
    document = problem(open_api.submit(image=f"output:{job_id}/3"), 400, "invalid_request")
    assert document["errors"] == [{"pointer": "/image", "detail": f"job {job_id} has no output 3"}]


def test_a_picture_of_a_job_that_has_none_is_refused_with_the_reason(open_api: Api) -> None:
    waiting = open_api.submit().json()["id"]
    past = open_api.submit().json()["id"]
    open_api.succeed(past)
    with open_api.database.write() as transaction:
        queries.get(transaction, UUID(past)).status = "expired"
    nowhere = "01a20719-4142-7484-a819-b2b18c8b5dd4"
    for job_id, reason in {
        waiting: "only a succeeded job has pictures",
        past: "were deleted after their retention time",
        nowhere: "there is no job",
    }.items():
        document = problem(open_api.submit(image=f"output:{job_id}/0"), 400, "invalid_request")
        assert pointers(document) == {"/image"}
        assert reason in document["detail"]


def test_a_picture_of_anothers_job_is_refused_as_if_there_were_none(keyed_api: Api) -> None:
    job_id = keyed_api.as_("anna").submit().json()["id"]
    keyed_api.succeed(job_id)
    document = problem(keyed_api.as_("ben").submit(image=f"output:{job_id}/0"), 400, "invalid_request")
    assert f"there is no job {job_id}" in document["detail"]


def test_an_address_on_the_web_is_left_to_the_worker(open_api: Api) -> None:
    assert open_api.submit(image="https://pictures.example/cat.png").status_code == 202


def test_plain_http_is_refused_at_once_where_no_worker_would_use_it(tmp_path: Path, sqlite_url: str) -> None:
    given = {"database.url": sqlite_url, "webhooks.allow_private_addresses": False}
    with Installation(tmp_path, given).serving() as server:

        def submit(address: str) -> httpx.Response:
            body = {"prompt": "a fox", "image": address, "mask": address, "webhook_url": address}
            return httpx.post(f"{server.url}/api/generate", json=body)

        refused = problem(submit("HTTP://example.com/a"), 400, "invalid_request")
        assert pointers(refused) == {"/image", "/mask", "/webhook_url"}
        assert submit("https://example.com/a").status_code == 202


def test_of_a_stranger_no_body_is_read(keyed_api: Api) -> None:
    too_large = iter([bytes(1024 * 1024)] * 40)
    with suppress(httpx.WriteError):
        problem(
            keyed_api.post("/api/inputs", content=too_large, headers={"content-type": "image/png"}), 401, "unauthorized"
        )


def test_of_many_uploads_at_once_only_a_few_are_open(
    tmp_path: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small file may hold a picture that takes half a gigabyte while it is open."""
    counting = threading.Lock()
    now_open: list[int] = [0]
    most: list[int] = [0]

    def watched(content: bytes, field: str) -> Image.Image:
        with counting:
            now_open[0] += 1
            most[0] = max(most[0], now_open[0])
        opened = open_picture(content, field)
        time.sleep(0.05)  # longer than the next upload takes to arrive
        with counting:
            now_open[0] -= 1
        return opened

    monkeypatch.setattr(inputs_route, "open_picture", watched)
    given = {"profile": "demo", "data_dir": str(tmp_path), "database.url": sqlite_url, "server.api_keys": KEYS}
    settings = load_settings({}, given)
    headers = {"content-type": "image/png", "authorization": f"Bearer {KEYS['anna']}"}
    with TestClient(create_app(settings)) as client, ThreadPoolExecutor(6) as pool:
        sent = [pool.submit(client.post, "/api/inputs", content=picture(colour), headers=headers) for colour in COLOURS]
        assert [one.result().status_code for one in sent] == [201] * len(COLOURS)
    assert most[0] <= 2
