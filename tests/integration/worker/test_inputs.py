"""What a job starts from is fetched by its worker, from where it may, and as far as it may."""

import hashlib
import io
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from uuid import UUID

import pytest
from PIL import Image

from tests.integration.webhooks.receiver import Receiver, receiving, status
from tests.integration.worker.conftest import Studio
from worker.inputs import InputSource
from zcore.errors import GenerationCanceled, InputUnavailable, InvalidRequest, StorageError
from zcore.imaging.encode import read_parameters
from zcore.jobs import inputs, queries
from zcore.jobs.inputs import UploadedPicture
from zcore.request import GenerationDefaults, GenerationRequest, RequestLimits, parse_submission
from zcore.settings import WebhooksSettings

TEAL = (0, 128, 128)


def picture(kind: str = "png", colour: tuple[int, int, int] = TEAL) -> bytes:
    """A file of a picture in one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (48, 32), colour).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def web() -> Iterator[Receiver]:
    """A server that has a picture."""
    with receiving() as started:
        started.script(status(200, picture()))
        yield started


def source(studio: Studio, max_bytes: int = 10_000, timeout_s: float = 5.0, private: bool = True) -> InputSource:
    """Where inputs come from, under these bounds."""
    settings = WebhooksSettings(timeout_s=timeout_s, allow_private_addresses=private)
    return InputSource(studio.database, studio.storage, settings, max_bytes)


def asked(**fields: str) -> GenerationRequest:
    """A request with these inputs."""
    body = {"prompt": "a fox", "width": 64, "height": 64, **fields}
    return parse_submission(body, GenerationDefaults(), RequestLimits()).request


def unhurried() -> None:
    """Nobody calls the job off."""


def unheard(_relief: object) -> None:
    """Memory suffices."""


def uploaded(studio: Studio, content: bytes, owner: str = "anna") -> str:
    """The address of an upload."""
    sha256 = hashlib.sha256(content).hexdigest()
    with studio.database.write() as transaction:
        inputs.keep(transaction, owner, UploadedPicture(sha256, "png", 48, 32, len(content)), 600)
    studio.storage.put(inputs.key_of(owner, sha256), content, "image/png")
    return f"input:{sha256}"


def painted(studio: Studio) -> UUID:
    """A succeeded job with a picture."""
    job_id = studio.submit()
    studio.work()
    return job_id


def refusal(studio: Studio, address: str, **bounds: float) -> InputUnavailable:
    """How fetching it ends."""
    with pytest.raises(InputUnavailable) as raised:
        source(studio, **bounds).fetch(asked(image=address), "anna", unhurried, unheard)  # type: ignore[arg-type]
    return raised.value


def test_a_job_is_painted_from_its_upload_and_its_file_says_so(studio: Studio) -> None:
    image, mask = picture(), picture("bmp", (255, 255, 255))
    job_id = studio.submit(image=uploaded(studio, image), mask=uploaded(studio, mask))
    studio.work()
    (given,) = studio.painter.given
    assert given.image is not None
    assert given.mask is not None
    assert (given.image.getpixel((0, 0)), given.mask.getpixel((0, 0))) == (TEAL, (255, 255, 255))
    (output,) = studio.look(job_id).outputs
    parameters = read_parameters(studio.storage.get(output.key))
    assert parameters is not None
    assert parameters.inputs == {
        "image": hashlib.sha256(image).hexdigest(), "mask": hashlib.sha256(mask).hexdigest(),
    }  # fmt: skip


def test_a_job_without_inputs_is_given_none(studio: Studio) -> None:
    studio.submit()
    studio.work()
    (given,) = studio.painter.given
    assert (given.image, given.mask) == (None, None)


def test_a_picture_that_an_earlier_job_painted_is_found(studio: Studio) -> None:
    first = painted(studio)
    job_id = studio.submit(image=f"output:{first}/0")
    studio.work()
    assert studio.look(job_id).status == "succeeded"
    image = studio.painter.given[-1].image
    assert image is not None
    assert (image.size, image.getpixel((0, 0))) == ((64, 64), (128, 128, 128))


def test_nothing_of_another_owner_is_found(studio: Studio) -> None:
    upload, job_id = uploaded(studio, picture(), owner="ben"), painted(studio)
    assert not refusal(studio, upload).retryable
    source(studio).fetch(asked(image=upload), "ben", unhurried, unheard)
    with pytest.raises(InputUnavailable, match="there is no job"):
        source(studio).fetch(asked(image=f"output:{job_id}/0"), "ben", unhurried, unheard)


def test_a_picture_that_expires_before_the_job_is_painted_ends_it_for_good(studio: Studio) -> None:
    first = painted(studio)
    job_id = studio.submit(image=f"output:{first}/0")
    with studio.database.write() as transaction:
        queries.get(transaction, first).status = "expired"
    studio.work()
    job = studio.look(job_id)
    assert (job.status, job.error_code, job.error_retryable) == ("failed", "input_unavailable", False)
    assert job.error_message == f"image: the pictures of job {first} were deleted after their retention time"


def test_bytes_that_are_gone_from_storage_end_the_job_for_good(studio: Studio) -> None:
    first, upload = painted(studio), uploaded(studio, picture())
    jobs = [studio.submit(image=address) for address in (f"output:{first}/0", upload)]
    studio.storage.delete(studio.storage.pictures())
    studio.work()
    for job_id in jobs:
        assert (studio.look(job_id).error_code, studio.look(job_id).attempt) == ("input_unavailable", 1)


def test_a_store_that_is_down_is_the_stores_fault_and_tried_again(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = uploaded(studio, picture())

    def refuse(_key: str) -> bytes:
        raise StorageError("the store is down")

    monkeypatch.setattr(studio.storage, "get", refuse)
    with pytest.raises(StorageError) as raised:
        source(studio).fetch(asked(image=upload), "anna", unhurried, unheard)
    assert raised.value.retryable


def test_a_picture_on_the_web_is_fetched(studio: Studio, web: Receiver) -> None:
    fetched = source(studio).fetch(asked(image=web.url), "anna", unhurried, unheard)
    assert fetched.pictures.image is not None
    assert fetched.pictures.image.getpixel((0, 0)) == TEAL
    assert fetched.sha256s == {"image": hashlib.sha256(picture()).hexdigest()}
    (told,) = web.told
    assert told.headers["host"] == web.url.split("/")[2]
    assert "authorization" not in told.headers


def test_an_address_of_ones_own_network_is_never_asked(studio: Studio, web: Receiver) -> None:
    for url in (web.url, web.url.replace("http:", "https:"), "https://169.254.169.254/latest/meta-data"):
        assert not refusal(studio, url, private=False).retryable
    assert web.told == []


def test_a_redirect_is_not_followed(studio: Studio, web: Receiver) -> None:
    web.script(status(302, location=web.url), status(200, picture()))
    fault = refusal(studio, web.url)
    assert (fault.message, fault.retryable) == ("image: the server answered 302, and redirects are not followed", False)
    assert len(web.told) == 1


@pytest.mark.parametrize(
    ("code", "retryable"),
    [(400, False), (403, False), (404, False), (410, False), (429, True), (500, True), (503, True)],
)
def test_what_a_server_refuses_is_asked_for_again_only_where_that_may_pass(
    studio: Studio, web: Receiver, code: int, retryable: bool
) -> None:
    web.script(status(code, picture()))
    fault = refusal(studio, web.url)
    assert (fault.message, fault.retryable) == (f"image: the server answered {code}", retryable)


def test_a_server_that_recovers_is_asked_by_the_next_attempt(studio: Studio, web: Receiver) -> None:
    web.script(status(503), status(200, picture()))
    job_id = studio.submit(image=web.url)
    studio.work()
    assert (studio.look(job_id).status, studio.look(job_id).attempt) == ("succeeded", 2)


def test_nobody_there_may_pass(studio: Studio) -> None:
    with receiving() as gone:
        url = gone.url
    assert refusal(studio, url).retryable
    assert refusal(studio, f"http://{'a' * 70}.example/cat.png").retryable


def test_a_file_may_have_just_as_many_bytes_as_allowed(studio: Studio, web: Receiver) -> None:
    source(studio, max_bytes=len(picture())).fetch(asked(image=web.url), "anna", unhurried, unheard)
    fault = refusal(studio, web.url, max_bytes=len(picture()) - 1)
    assert (fault.retryable, f"larger than the {len(picture()) - 1} bytes" in fault.message) == (False, True)


def test_an_answer_without_end_is_cut_off(studio: Studio, web: Receiver) -> None:
    sent = 0

    def endless(handler: BaseHTTPRequestHandler) -> None:
        nonlocal sent
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(bytes(10_000))
            sent += 10_000

    web.script(endless)
    assert "larger than" in refusal(studio, web.url).message
    assert sent < 50_000_000, "what the sockets hold, and no more"


def dribble(handler: BaseHTTPRequestHandler) -> None:
    """A byte now and then, for ever."""
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b".")
        time.sleep(0.02)


def test_a_server_that_gives_a_byte_now_and_then_is_given_up(studio: Studio, web: Receiver) -> None:
    web.script(dribble)
    fault = refusal(studio, web.url, timeout_s=0.3)
    assert (fault.message, fault.retryable) == ("image: the server did not give it within 0.3 s", True)


def test_an_answer_that_breaks_off_may_pass(studio: Studio, web: Receiver) -> None:
    def break_off(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-length", "1000")
        handler.end_headers()
        handler.wfile.write(picture()[:50])

    web.script(break_off)
    assert refusal(studio, web.url).retryable


def test_what_turns_out_to_be_no_picture_is_the_callers_fault(studio: Studio, web: Receiver) -> None:
    web.script(status(200, b"<html>"))
    with pytest.raises(InvalidRequest, match="mask: is not a picture"):
        source(studio).fetch(asked(image=uploaded(studio, picture()), mask=web.url), "anna", unhurried, unheard)
    job_id = studio.submit(image=web.url)
    studio.work()
    job = studio.look(job_id)
    assert (job.status, job.error_code, job.attempt) == ("failed", "invalid_request", 1)


def test_a_job_called_off_does_not_wait_for_a_slow_server(studio: Studio, web: Receiver) -> None:
    def called_off() -> None:
        if web.told:
            raise GenerationCanceled("the caller wants it no more")

    web.script(dribble)
    with pytest.raises(GenerationCanceled):
        source(studio, timeout_s=300).fetch(asked(image=web.url), "anna", called_off, unheard)


@pytest.fixture
def silent_name_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Asked for any name it does not answer; set once it is asked."""
    asked_for, over = threading.Event(), threading.Event()

    def look_up(*_arguments: object, **_options: object) -> list[object]:
        asked_for.set()
        over.wait(60)
        raise OSError("no answer")

    monkeypatch.setattr("worker.addresses.socket.getaddrinfo", look_up)
    yield asked_for
    over.set()


def test_a_name_server_that_does_not_answer_holds_nobody(studio: Studio, silent_name_server: threading.Event) -> None:
    def called_off() -> None:
        if silent_name_server.is_set():
            raise GenerationCanceled("the caller wants it no more")

    request = asked(image="https://pictures.example/a.png")
    with pytest.raises(GenerationCanceled):
        source(studio, timeout_s=300).fetch(request, "anna", called_off, unheard)
    with pytest.raises(InputUnavailable, match=r"did not give it within 0\.2 s"):
        source(studio, timeout_s=0.2).fetch(request, "anna", unhurried, unheard)
