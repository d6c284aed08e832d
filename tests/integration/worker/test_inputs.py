"""Inputs of a job: the worker fetches them from allowed addresses and within the limits."""

import hashlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from uuid import UUID

import pytest
from PIL import Image

from tests.integration.webhooks.receiver import Receiver, receiving, status
from tests.integration.worker.conftest import Environment
from tests.waiting import wait_until
from worker.inputs.fetch import FetchedInputs, InputSource
from zcore.errors import GenerationCanceled, InputUnavailable, InvalidRequest
from zcore.image_files.writing import read_parameters
from zcore.jobs import queries, uploads
from zcore.jobs.uploads import UploadedImage
from zcore.request import GenerationDefaults, GenerationRequest, RequestLimits, parse_submission
from zcore.settings import WebhooksSettings
from zcore.storage_keys import PROBE_KEY

TEAL = (0, 128, 128)


def image_file(file_format: str = "png", color: tuple[int, int, int] = TEAL) -> bytes:
    """Return an image file of one color."""
    buffer = io.BytesIO()
    Image.new("RGB", (48, 32), color).save(buffer, file_format)
    return buffer.getvalue()


@pytest.fixture
def web() -> Iterator[Receiver]:
    """A server that returns an image."""
    with receiving() as started:
        started.script(status(200, image_file()))
        yield started


def source(
    environment: Environment, max_bytes: int = 10_000, timeout_s: float = 5.0, allow_private: bool = True
) -> InputSource:
    """Return an input source with these limits."""
    settings = WebhooksSettings(timeout_s=timeout_s, allow_private_addresses=allow_private)
    limits = RequestLimits(max_input_bytes=max_bytes, max_input_pixels=4096)
    return InputSource(environment.database, environment.patient_storage(), settings, limits)


def request_with(**fields: str) -> GenerationRequest:
    """Return a request with these inputs."""
    body = {"prompt": "a fox", "width": 64, "height": 64, **fields}
    return parse_submission(body, GenerationDefaults(), RequestLimits()).request


def no_interruption() -> None:
    """Let the job continue."""


def ignore_fallback(_step: object) -> None:
    """Ignore out-of-memory fallback steps."""


def fetch(
    source: InputSource, owner: str = "anna", check: Callable[[], None] = no_interruption, **fields: str
) -> FetchedInputs:
    """Return the inputs that a request with these fields names."""
    return source.fetch(request_with(**fields), owner, check, ignore_fallback)


def uploaded(environment: Environment, content: bytes, owner: str = "anna") -> str:
    """Store an upload, and return its address."""
    sha256 = hashlib.sha256(content).hexdigest()
    with environment.database.write() as transaction:
        recorded = uploads.record(transaction, owner, UploadedImage(sha256, "png", 48, 32, len(content)))
        uploads.mark_stored(transaction, recorded, 600)
    environment.storage.put(recorded.storage_key, content, "image/png")
    return f"input:{sha256}"


def succeeded_job(environment: Environment) -> UUID:
    """Return a succeeded job with one image."""
    job_id = environment.submit()
    environment.generate_due()
    return job_id


def fetch_error(environment: Environment, address: str, **limits: float) -> InputUnavailable:
    """Return the error that fetching an address ends with."""
    with pytest.raises(InputUnavailable) as raised:
        fetch(source(environment, **limits), image=address)
    return raised.value


def test_an_image_is_generated_from_uploads_and_its_file_records_their_hashes(environment: Environment) -> None:
    image, mask = image_file(), image_file("bmp", (255, 255, 255))
    job_id = environment.submit(image=uploaded(environment, image), mask=uploaded(environment, mask))
    environment.generate_due()
    (inputs,) = environment.pipeline.inputs
    assert inputs.image is not None
    assert inputs.mask is not None
    assert (inputs.image.getpixel((0, 0)), inputs.mask.getpixel((0, 0))) == (TEAL, (255, 255, 255))
    (output,) = environment.job(job_id).outputs
    parameters = read_parameters(environment.storage.get(output.key))
    assert parameters is not None
    assert parameters.inputs == {
        "image": hashlib.sha256(image).hexdigest(), "mask": hashlib.sha256(mask).hexdigest(),
    }  # fmt: skip


def test_a_job_without_inputs_receives_none(environment: Environment) -> None:
    environment.submit()
    environment.generate_due()
    (inputs,) = environment.pipeline.inputs
    assert (inputs.image, inputs.mask) == (None, None)


def test_an_output_of_an_earlier_job_is_an_input(environment: Environment) -> None:
    first = succeeded_job(environment)
    job_id = environment.submit(image=f"output:{first}/0")
    environment.generate_due()
    assert environment.job(job_id).status == "succeeded"
    image = environment.pipeline.inputs[-1].image
    assert image is not None
    assert (image.size, image.getpixel((0, 0))) == ((64, 64), (128, 128, 128))


def test_uploads_and_outputs_of_another_owner_are_not_found(environment: Environment) -> None:
    upload, job_id = uploaded(environment, image_file(), owner="ben"), succeeded_job(environment)
    assert not fetch_error(environment, upload).retryable
    fetch(source(environment), image=upload, owner="ben")
    with pytest.raises(InputUnavailable, match=f"^image: .*{job_id}"):
        fetch(source(environment), image=f"output:{job_id}/0", owner="ben")


def test_an_input_that_expires_before_generation_fails_the_job(environment: Environment) -> None:
    first = succeeded_job(environment)
    job_id = environment.submit(image=f"output:{first}/0")
    with environment.database.write() as transaction:
        queries.get(transaction, first).stored_status = "expired"
    environment.generate_due()
    job = environment.job(job_id)
    assert (job.status, job.error_code, job.error_retryable) == ("failed", "input_unavailable", False)
    assert job.error_message is not None
    assert job.error_message.startswith("image: ")
    assert str(first) in job.error_message


def test_an_input_that_is_missing_from_storage_fails_the_job(environment: Environment) -> None:
    first, upload = succeeded_job(environment), uploaded(environment, image_file())
    jobs = [environment.submit(image=address) for address in (f"output:{first}/0", upload)]
    environment.storage.delete(environment.storage.keys())
    environment.generate_due()
    for job_id in jobs:
        assert (environment.job(job_id).error_code, environment.job(job_id).attempt) == ("input_unavailable", 1)


def test_a_job_that_reads_from_storage_waits_while_it_is_down(environment: Environment) -> None:
    job_id = environment.submit(image=uploaded(environment, image_file()))
    environment.storage.refuses = lambda key: key.startswith("inputs/") or key == PROBE_KEY
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(environment.generate_due, upload_retry_s=0.0)
        wait_until(lambda: environment.storage.refused.count(PROBE_KEY) > 1)
        assert environment.job(job_id).status == "running"
        environment.storage.refuses = lambda _key: False
        working.result()
    environment.generate_due()
    assert (environment.job(job_id).status, environment.events(job_id)) == (
        "succeeded",
        ["queued", "claimed", "succeeded"],
    )


def test_an_image_is_fetched_by_url(environment: Environment, web: Receiver) -> None:
    fetched = fetch(source(environment), image=web.url)
    assert fetched.inputs.image is not None
    assert fetched.inputs.image.getpixel((0, 0)) == TEAL
    assert fetched.sha256s == {"image": hashlib.sha256(image_file()).hexdigest()}
    (request,) = web.requests
    assert request.headers["host"] == web.url.split("/")[2]
    assert "authorization" not in request.headers


def test_a_private_address_is_never_contacted(environment: Environment, web: Receiver) -> None:
    for url in (web.url, web.url.replace("http:", "https:"), "https://169.254.169.254/latest/meta-data"):
        assert not fetch_error(environment, url, allow_private=False).retryable
    assert web.requests == []


def test_a_redirect_is_not_followed(environment: Environment, web: Receiver) -> None:
    web.script(status(302, location=web.url), status(200, image_file()))
    fault = fetch_error(environment, web.url)
    assert (fault.message, fault.retryable) == ("image: the server answered 302, and redirects are not followed", False)
    assert len(web.requests) == 1


@pytest.mark.parametrize(
    ("code", "retryable"),
    [(400, False), (403, False), (404, False), (410, False), (429, True), (500, True), (503, True)],
)
def test_an_error_status_is_retryable_only_if_it_may_be_temporary(
    environment: Environment, web: Receiver, code: int, retryable: bool
) -> None:
    web.script(status(code, image_file()))
    fault = fetch_error(environment, web.url)
    assert (fault.message, fault.retryable) == (f"image: the server answered {code}", retryable)


def test_the_next_attempt_fetches_from_a_server_that_has_recovered(environment: Environment, web: Receiver) -> None:
    web.script(status(503), status(200, image_file()))
    job_id = environment.submit(image=web.url)
    environment.generate_due()
    assert (environment.job(job_id).status, environment.job(job_id).attempt) == ("succeeded", 2)


def test_an_unreachable_server_is_retryable(environment: Environment) -> None:
    with receiving() as stopped:
        url = stopped.url
    assert fetch_error(environment, url).retryable
    assert fetch_error(environment, "http://nowhere.invalid/cat.png").retryable


def test_a_file_may_be_exactly_as_large_as_the_limit(environment: Environment, web: Receiver) -> None:
    fetch(source(environment, max_bytes=len(image_file())), image=web.url)
    fault = fetch_error(environment, web.url, max_bytes=len(image_file()) - 1)
    assert not fault.retryable
    assert fault.message == f"image: is larger than the limit of {len(image_file()) - 1} bytes"


def test_a_response_without_end_is_cut_off(environment: Environment, web: Receiver) -> None:
    sent = 0

    def endless(handler: BaseHTTPRequestHandler) -> None:
        nonlocal sent
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(bytes(10_000))
            sent += 10_000

    web.script(endless)
    assert "larger than" in fetch_error(environment, web.url).message
    assert sent < 50_000_000, "no more is sent than the sockets buffer"


def dribble(handler: BaseHTTPRequestHandler) -> None:
    """Send single bytes slowly, without end."""
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b".")
        time.sleep(0.02)


def test_a_server_that_sends_single_bytes_slowly_times_out(environment: Environment, web: Receiver) -> None:
    web.script(dribble)
    fault = fetch_error(environment, web.url, timeout_s=0.3)
    assert (fault.message, fault.retryable) == ("image: the server did not send the file within 0.3 s", True)


def test_a_response_that_breaks_off_is_retryable(environment: Environment, web: Receiver) -> None:
    def break_off(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-length", "1000")
        handler.end_headers()
        handler.wfile.write(image_file()[:50])

    web.script(break_off)
    assert fetch_error(environment, web.url).retryable


def test_a_file_that_is_not_an_image_fails_the_job(environment: Environment, web: Receiver) -> None:
    web.script(status(200, b"<html>"))
    with pytest.raises(InvalidRequest, match=r"^mask: .*PNG"):
        fetch(source(environment), image=uploaded(environment, image_file()), mask=web.url)
    job_id = environment.submit(image=web.url)
    environment.generate_due()
    job = environment.job(job_id)
    assert (job.status, job.error_code, job.attempt) == ("failed", "invalid_request", 1)


def test_a_canceled_job_does_not_wait_for_a_slow_server(environment: Environment, web: Receiver) -> None:
    def raise_if_canceled() -> None:
        if web.requests:
            raise GenerationCanceled("the caller canceled the job")

    web.script(dribble)
    with pytest.raises(GenerationCanceled):
        fetch(source(environment, timeout_s=300), image=web.url, check=raise_if_canceled)


@pytest.fixture
def silent_name_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A name server that does not answer; the event is set once it has received a query."""
    queried, test_ended = threading.Event(), threading.Event()

    def look_up(*_arguments: object, **_options: object) -> list[object]:
        queried.set()
        test_ended.wait(60)
        raise OSError("no answer")

    monkeypatch.setattr("worker.outbound.addresses.socket.getaddrinfo", look_up)
    yield queried
    test_ended.set()


def test_a_name_server_that_does_not_answer_blocks_no_job(
    environment: Environment, silent_name_server: threading.Event
) -> None:
    def raise_if_canceled() -> None:
        if silent_name_server.is_set():
            raise GenerationCanceled("the caller canceled the job")

    url = "https://images.example/a.png"
    with pytest.raises(GenerationCanceled):
        fetch(source(environment, timeout_s=300), image=url, check=raise_if_canceled)
    with pytest.raises(InputUnavailable, match=r"did not send the file within 0\.2 s"):
        fetch(source(environment, timeout_s=0.2), image=url)


def test_an_image_with_too_many_pixels_is_refused(environment: Environment) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (65, 64)).save(buffer, "PNG")
    with pytest.raises(InvalidRequest, match=r"^image: is 65x64 \(4160 pixels\); at most 4096 pixels are accepted$"):
        fetch(source(environment), image=uploaded(environment, buffer.getvalue()))
