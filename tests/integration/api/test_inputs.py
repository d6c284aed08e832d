"""Input images: uploading them, and using them in a submission."""

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
from pillow_heif import register_heif_opener

from server.app import create_app
from server.routes import inputs as inputs_route
from tests.integration.api.conftest import KEYS, Api, pointers, problem
from tests.integration.installation import Installation
from zcore.image_files.input_images import open_image
from zcore.jobs import queries, uploads
from zcore.jobs.models import Input
from zcore.settings import load_settings

DAY = timedelta(days=1)


def image_file(colour: str = "teal", kind: str = "png", size: tuple[int, int] = (48, 32)) -> bytes:
    """Return an image file of a single colour."""
    register_heif_opener()
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


COLOURS = ("red", "green", "blue", "teal", "gold", "navy")


def upload(api: Api, content: bytes, kind: str = "image/png") -> httpx.Response:
    """Upload a file in the way of curl's `--data-binary`."""
    return api.post("/api/inputs", content=content, headers={"content-type": kind})


def age(api: Api, input_id: str, change: Callable[[datetime], datetime]) -> None:
    """Change when an upload expires."""
    with api.database.write() as transaction:
        for row in transaction.session.query(Input).filter(Input.sha256 == input_id.removeprefix("input:")):
            row.expires_at = change(row.expires_at)


@pytest.mark.parametrize(
    ("kind", "media_type"),
    [
        ("png", "image/png"),
        ("jpeg", "image/jpeg"),
        ("heif", "image/heic"),
        ("webp", "application/octet-stream"),
    ],
)
def test_an_upload_returns_its_id_and_properties(open_api: Api, kind: str, media_type: str) -> None:
    content = image_file("navy", kind)
    answer = upload(open_api, content, media_type)
    assert answer.status_code == 201, answer.text
    uploaded = answer.json()
    expires_at = datetime.fromisoformat(uploaded.pop("expires_at"))
    assert abs(expires_at - datetime.now(UTC) - DAY) < timedelta(minutes=1)
    sha256 = hashlib.sha256(content).hexdigest()
    assert uploaded == {"id": f"input:{sha256}", "width": 48, "height": 32, "format": kind, "bytes": len(content)}
    with open_api.database.read() as transaction:
        stored = uploads.find(transaction, "local", sha256)
    assert stored is not None
    assert (open_api.installation.folder / "storage" / stored.storage_key).read_bytes() == content


def test_an_upload_that_storage_refuses_is_unknown_until_it_is_sent_again(tmp_path: Path, sqlite_url: str) -> None:
    content = image_file("navy")
    sha256 = hashlib.sha256(content).hexdigest()
    installation = Installation(tmp_path, {"database.url": sqlite_url})
    with installation.serving() as server, installation.database() as database:

        def upload_it() -> httpx.Response:
            return httpx.post(f"{server.url}/api/inputs", content=content, headers={"content-type": "image/png"})

        def submit_it() -> httpx.Response:
            return httpx.post(f"{server.url}/api/generate", json={"prompt": "a fox", "image": f"input:{sha256}"})

        obstacle = tmp_path / "storage" / "inputs"
        obstacle.write_bytes(b"")  # no folder can be created in its place
        problem(upload_it(), 503, "storage_unavailable")
        assert "there is no such upload" in problem(submit_it(), 400, "invalid_request")["detail"]
        obstacle.unlink()
        assert upload_it().status_code == 201
        assert submit_it().status_code == 202
        with database.read() as transaction:
            stored = uploads.find(transaction, "local", sha256)
        assert stored is not None
        assert (tmp_path / "storage" / stored.storage_key).read_bytes() == content


def test_the_reported_size_applies_the_exif_orientation(open_api: Api) -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.new("RGB", (48, 32)).save(buffer, "jpeg", exif=exif)
    uploaded = upload(open_api, buffer.getvalue(), "image/jpeg").json()
    assert (uploaded["width"], uploaded["height"]) == (32, 48)


def test_uploading_the_same_bytes_again_returns_the_same_id_and_extends_its_lifetime(open_api: Api) -> None:
    first = upload(open_api, image_file("olive")).json()
    again = upload(open_api, image_file("olive")).json()
    assert again["id"] == first["id"]
    assert datetime.fromisoformat(again["expires_at"]) > datetime.fromisoformat(first["expires_at"])


def test_uploading_again_never_shortens_the_lifetime(open_api: Api) -> None:
    first = upload(open_api, image_file("plum")).json()
    age(open_api, first["id"], lambda end: end + 2 * DAY)
    again = upload(open_api, image_file("plum")).json()
    assert datetime.fromisoformat(again["expires_at"]) == datetime.fromisoformat(first["expires_at"]) + 2 * DAY


@pytest.mark.parametrize(
    "content", [b"", b"not an image", image_file()[:60], b"<svg xmlns='http://www.w3.org/2000/svg'/>"]
)
def test_an_invalid_image_is_refused_and_not_stored(open_api: Api, content: bytes) -> None:
    document = problem(upload(open_api, content), 400, "invalid_request")
    assert pointers(document) == {"/image"}
    address = f"input:{hashlib.sha256(content).hexdigest()}"
    problem(open_api.submit(image=address), 400, "invalid_request")


@pytest.mark.parametrize(
    "kind", ["multipart/form-data", "text/plain", "application/x-www-form-urlencoded", "application/json", "image/", ""]
)
def test_a_media_type_that_a_form_of_another_site_could_post_is_refused(open_api: Api, kind: str) -> None:
    document = problem(upload(open_api, image_file(), kind), 415, "unsupported_media_type")
    assert "image/* or application/octet-stream" in document["detail"]


def test_a_page_of_another_site_gets_no_cors_permission(open_api: Api) -> None:
    preflight = {"origin": "https://other.example", "access-control-request-method": "POST"}
    answer = open_api.client.options(f"{open_api.url}/api/inputs", headers=preflight)
    assert not [name for name in answer.headers if name.startswith("access-control")]
    rebound = {"host": "other.example", "content-type": "image/png"}
    problem(open_api.post("/api/inputs", content=image_file(), headers=rebound), 401, "unauthorized")


def test_the_configured_size_limits_apply_exactly(tmp_path: Path, sqlite_url: str) -> None:
    content = image_file("red", size=(64, 64))
    limits = {"limits.max_input_bytes": len(content), "limits.max_input_pixels": 4096}
    installation = Installation(tmp_path, {"database.url": sqlite_url, **limits})
    with installation.serving() as server:
        headers = {"content-type": "image/png"}
        accepted = httpx.post(f"{server.url}/api/inputs", content=content, headers=headers)
        assert accepted.status_code == 201, accepted.text
        problem(httpx.post(f"{server.url}/api/inputs", content=content + b"\0", headers=headers), 413, "body_too_large")
        wider = image_file("red", "webp", size=(65, 64))
        document = problem(
            httpx.post(f"{server.url}/api/inputs", content=wider, headers=headers), 400, "invalid_request"
        )
        assert document["errors"][0]["detail"] == "is 65x64 (4160 pixels); at most 4096 pixels are accepted"
        chunked = iter([content, b"\0"])
        problem(httpx.post(f"{server.url}/api/inputs", content=chunked, headers=headers), 413, "body_too_large")


def test_an_upload_may_be_larger_than_a_submission(open_api: Api) -> None:
    content = image_file("white", "bmp", (700, 700))
    assert len(content) > 1024 * 1024
    assert upload(open_api, content, "image/bmp").status_code == 201


def test_an_upload_requires_a_key_and_is_only_usable_by_its_owner(keyed_api: Api) -> None:
    problem(upload(keyed_api, image_file()), 401, "unauthorized")
    address = upload(keyed_api.as_("anna"), image_file("gold")).json()["id"]
    assert keyed_api.as_("anna").submit(image=address).status_code == 202
    document = problem(keyed_api.as_("ben").submit(image=address), 400, "invalid_request")
    assert pointers(document) == {"/image"}
    assert upload(keyed_api.as_("ben"), image_file("gold")).json()["id"] == address
    assert keyed_api.as_("ben").submit(image=address).status_code == 202


def test_a_missing_or_expired_upload_is_refused_on_its_field(open_api: Api) -> None:
    address = upload(open_api, image_file("pink")).json()["id"]
    document = problem(open_api.submit(image=address, mask=f"input:{'0' * 64}"), 400, "invalid_request")
    assert pointers(document) == {"/mask"}
    assert "/api/inputs" in document["detail"]
    age(open_api, address, lambda end: end - DAY - timedelta(seconds=1))
    document = problem(open_api.submit(image=address), 400, "invalid_request")
    assert "expired" in document["detail"]
    upload(open_api, image_file("pink"))
    assert open_api.submit(image=address).status_code == 202


def test_a_repeated_submission_is_replayed_even_if_its_upload_has_expired(open_api: Api) -> None:
    address = upload(open_api, image_file("tan")).json()["id"]
    key = {"idempotency-key": "from-an-upload"}
    first = open_api.submit(headers=key, image=address)
    age(open_api, address, lambda end: end - 2 * DAY)
    again = open_api.submit(headers=key, image=address)
    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])


def test_an_output_of_the_callers_own_job_is_accepted(open_api: Api) -> None:
    job_id = open_api.submit().json()["id"]
    open_api.succeed(job_id)
    assert open_api.submit(image=f"output:{job_id}/0").status_code == 202
    document = problem(open_api.submit(image=f"output:{job_id}/3"), 400, "invalid_request")
    assert pointers(document) == {"/image"}
    assert "no output 3" in document["detail"]


def test_an_output_of_a_job_without_images_is_refused_with_the_reason(open_api: Api) -> None:
    waiting = open_api.submit().json()["id"]
    past = open_api.submit().json()["id"]
    open_api.succeed(past)
    with open_api.database.write() as transaction:
        queries.get(transaction, UUID(past)).stored_status = "expired"
    nowhere = "01a20719-4142-7484-a819-b2b18c8b5dd4"
    for job_id, reason in {
        waiting: "only a succeeded job has",
        past: "deleted after",
        nowhere: "there is no job",
    }.items():
        document = problem(open_api.submit(image=f"output:{job_id}/0"), 400, "invalid_request")
        assert pointers(document) == {"/image"}
        assert reason in document["detail"]


def test_an_output_of_another_callers_job_is_refused_as_not_found(keyed_api: Api) -> None:
    job_id = keyed_api.as_("anna").submit().json()["id"]
    keyed_api.succeed(job_id)
    document = problem(keyed_api.as_("ben").submit(image=f"output:{job_id}/0"), 400, "invalid_request")
    assert f"there is no job {job_id}" in document["detail"]


def test_a_web_address_is_not_fetched_by_the_server(open_api: Api) -> None:
    assert open_api.submit(image="https://images.example/cat.png").status_code == 202


def test_plain_http_is_refused_unless_private_addresses_are_allowed(tmp_path: Path, sqlite_url: str) -> None:
    given = {"database.url": sqlite_url, "webhooks.allow_private_addresses": False}
    with Installation(tmp_path, given).serving() as server:

        def submit(url: str) -> httpx.Response:
            body = {"prompt": "a fox", "image": url, "mask": url, "webhook_url": url}
            return httpx.post(f"{server.url}/api/generate", json=body)

        refused = problem(submit("HTTP://example.com/a"), 400, "invalid_request")
        assert pointers(refused) == {"/image", "/mask", "/webhook_url"}
        assert "must be an https URL" in refused["errors"][0]["detail"]
        assert submit("https://example.com/a").status_code == 202


def test_the_body_of_an_unauthorized_upload_is_not_read(keyed_api: Api) -> None:
    too_large = iter([bytes(1024 * 1024)] * 40)
    with suppress(httpx.WriteError):
        problem(
            keyed_api.post("/api/inputs", content=too_large, headers={"content-type": "image/png"}), 401, "unauthorized"
        )


def test_only_two_uploads_are_decoded_at_a_time(
    tmp_path: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even a small file may decode to half a gigabyte."""
    counting = threading.Lock()
    decoding: list[int] = [0]
    peak: list[int] = [0]

    def counted(content: bytes, field: str, max_pixels: int) -> Image.Image:
        with counting:
            decoding[0] += 1
            peak[0] = max(peak[0], decoding[0])
        image = open_image(content, field, max_pixels)
        time.sleep(0.05)  # longer than the next upload takes to arrive
        with counting:
            decoding[0] -= 1
        return image

    monkeypatch.setattr(inputs_route, "open_image", counted)
    given = {"profile": "demo", "data_dir": str(tmp_path), "database.url": sqlite_url, "server.api_keys": KEYS}
    settings = load_settings({}, given)
    headers = {"content-type": "image/png", "authorization": f"Bearer {KEYS['anna']}"}
    with TestClient(create_app(settings)) as client, ThreadPoolExecutor(6) as pool:
        uploads = [
            pool.submit(client.post, "/api/inputs", content=image_file(colour), headers=headers) for colour in COLOURS
        ]
        assert [one.result().status_code for one in uploads] == [201] * len(COLOURS)
    assert peak[0] <= 2
