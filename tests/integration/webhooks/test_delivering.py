"""Webhooks of ended jobs are signed, delivered, retried by schedule, and every attempt is recorded."""

import time
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from standardwebhooks import Webhook, WebhookVerificationError
from structlog.testing import capture_logs

from tests.api_description import Description, document_of
from tests.integration.webhooks.conftest import PUBLIC_URL, SECRET, Start, attempts_of, ended_job, link, webhook
from tests.integration.webhooks.receiver import Receiver, receiving, status
from tests.waiting import wait_until
from worker.shutdown import Shutdown
from worker.webhooks.delivery import Deliverer
from worker.webhooks.retry_schedule import retry_delay_s
from zcore.jobs import claims, lifecycle, webhooks
from zcore.jobs.database import Database, Limits
from zcore.jobs.webhooks import AttemptOutcome
from zcore.request import GenerationDefaults, RequestLimits, parse_submission
from zcore.settings import WebhooksSettings, load_settings


def test_the_standardwebhooks_package_verifies_what_is_sent(
    database: Database, receiver: Receiver, start: Start, tmp_path: Path
) -> None:
    job = ended_job(database, receiver.url, metadata={"order": "A-1001"})
    start()
    attempts_of(database, job, 1)
    (request,) = receiver.requests
    document = Webhook(SECRET).verify(request.body, request.headers)
    assert document["type"] == "job.succeeded"
    assert document["data"]["id"] == str(job.id)
    assert document["data"]["metadata"] == {"order": "A-1001"}
    assert document["data"]["outputs"][0]["url"].startswith("https://bucket.example/jobs/")
    assert document["data"]["urls"]["self"] == f"https://images.example/api/jobs/{job.id}"
    assert request.headers["content-type"] == "application/json"
    described = Description(document_of(load_settings({"ZIMAGE_PROFILE": "demo", "ZIMAGE_DATA_DIR": str(tmp_path)})))
    webhook_body = described.document["webhooks"]["job.succeeded"]["post"]["requestBody"]["content"]
    assert described.errors(webhook_body["application/json"]["schema"], document) == []
    assert request.headers["host"] == receiver.url.split("/")[2]


def test_a_changed_body_or_another_secret_does_not_verify(database: Database, receiver: Receiver, start: Start) -> None:
    job = ended_job(database, receiver.url)
    start()
    attempts_of(database, job, 1)
    (request,) = receiver.requests
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(request.body.replace(b"job.succeeded", b"job.failedxxx"), request.headers)
    with pytest.raises(WebhookVerificationError):
        Webhook("whsec_" + "b" * 44).verify(request.body, request.headers)


def test_a_webhook_is_signed_at_the_time_of_the_database(each_database_url: str, receiver: Receiver) -> None:
    moment = datetime(2031, 5, 4, 12, 0, tzinfo=UTC)
    with closing(Database(each_database_url, clock=lambda: moment)) as database:
        job = ended_job(database, receiver.url)
        settings = WebhooksSettings(allow_private_addresses=True)
        shutdown = Shutdown(grace_s=0)
        deliverer = Deliverer(database, link, PUBLIC_URL, SECRET, settings, interval_s=0.05, shutdown=shutdown)
        deliverer.start()
        try:
            attempts_of(database, job, 1)
        finally:
            shutdown.begin()
            deliverer.stop()
    (request,) = receiver.requests
    assert int(request.headers["webhook-timestamp"]) == moment.timestamp()


def test_a_delivered_event_is_recorded_and_not_sent_again(database: Database, receiver: Receiver, start: Start) -> None:
    receiver.script(status(204))
    job = ended_job(database, receiver.url)
    start()
    (attempt,) = attempts_of(database, job, 1)
    event, _ = webhook(database, job)
    assert (attempt.number, attempt.status_code) == (1, 204)
    assert (event.delivered_at is not None, event.next_attempt_at) == (True, None)
    second = ended_job(database, receiver.url)
    attempts_of(database, second, 1)
    assert len(receiver.requests) == 2, "each event is sent once"


def test_the_result_of_a_delivery_waits_for_a_connection(database_url: str, receiver: Receiver) -> None:
    """A result that is not recorded would have the receiver get the event twice."""
    with (
        closing(Database(database_url, pool_size=1, limits=Limits(pool_s=0.1))) as database,
        ExitStack() as holding,
        capture_logs() as logs,
    ):

        def hold_connection(handler: BaseHTTPRequestHandler) -> None:
            holding.enter_context(database.read())
            status(200)(handler)

        receiver.script(hold_connection)
        job = ended_job(database, receiver.url)
        settings = WebhooksSettings(timeout_s=5, allow_private_addresses=True)
        deliverer = Deliverer(
            database, link, PUBLIC_URL, SECRET, settings, interval_s=60, shutdown=Shutdown(grace_s=60)
        )
        deliverer.start()
        wait_until(lambda: [entry for entry in logs if entry["event"] == "webhook.record_repeated"])
        holding.close()
        attempts_of(database, job, 1)
        deliverer.stop()
        event, attempts = webhook(database, job)
    assert (event.delivered_at is not None, len(attempts), len(receiver.requests)) == (True, 1, 1)


def test_a_result_whose_answer_was_lost_is_recorded_once(database: Database, receiver: Receiver) -> None:
    job = ended_job(database, receiver.url)
    with database.write() as transaction:
        (due,) = webhooks.claim_due(transaction, 1, hold_s=60)
    outcome = AttemptOutcome(True, 204, "", 5, None)
    for is_repeated in (False, True):
        with database.write() as transaction:
            webhooks.record_attempt(transaction, due, outcome, is_repeated=is_repeated)
    assert len(webhook(database, job)[1]) == 1


def test_a_refused_event_is_retried_by_schedule_under_the_same_id(
    database: Database, receiver: Receiver, start: Start
) -> None:
    receiver.script(status(500, b"first"), status(404, b"second"), status(200, b"third"))
    job = ended_job(database, receiver.url)
    start()
    attempts = attempts_of(database, job, 3)
    assert [(a.number, a.status_code, a.response_body) for a in attempts] == [
        (1, 500, "first"), (2, 404, "second"), (3, 200, "third"),
    ]  # fmt: skip
    assert len({request.headers["webhook-id"] for request in receiver.requests}) == 1
    for request in receiver.requests:
        Webhook(SECRET).verify(request.body, request.headers)
    assert webhook(database, job)[0].delivered_at is not None


def test_an_event_is_given_up_after_the_whole_schedule_and_can_be_resent_manually(
    database: Database, receiver: Receiver, start: Start
) -> None:
    receiver.script(status(500))
    job = ended_job(database, receiver.url)
    start()
    attempts_of(database, job, 4)
    event, attempts = webhook(database, job)
    assert (event.delivered_at, event.next_attempt_at, len(attempts)) == (None, None, 4)
    receiver.script(status(200))
    with database.write() as transaction:
        webhooks.resend(transaction, event.job_id, event.id)
    attempts_of(database, job, 5)
    assert webhook(database, job)[0].delivered_at is not None


def test_a_redirect_is_a_failure_and_not_followed(database: Database, receiver: Receiver, start: Start) -> None:
    with receiving() as elsewhere:
        receiver.script(status(307, location=elsewhere.url), status(200))
        job = ended_job(database, receiver.url)
        start()
        attempts = attempts_of(database, job, 2)
        assert [attempt.status_code for attempt in attempts] == [307, 200]
        assert elsewhere.requests == []


def test_status_410_ends_the_attempts(database: Database, receiver: Receiver, start: Start) -> None:
    receiver.script(status(410))
    job = ended_job(database, receiver.url)
    start()
    attempts_of(database, job, 1)
    event, _ = webhook(database, job)
    assert (event.next_attempt_at, event.delivered_at) == (None, None)


@pytest.mark.parametrize("code", [429, 503])
def test_a_receiver_may_ask_for_a_longer_delay(database: Database, receiver: Receiver, start: Start, code: int) -> None:
    receiver.script(status(code, retry_after="3600"))
    job = ended_job(database, receiver.url)
    start()
    attempts_of(database, job, 1)
    event, (attempt,) = webhook(database, job)
    assert event.next_attempt_at is not None
    assert event.next_attempt_at - attempt.at == timedelta(hours=1)


def test_the_retry_delay_follows_the_schedule_and_the_retry_after_header() -> None:
    def delay_s(attempt: int, code: int | None = 500, retry_after: str | None = None) -> float | None:
        return retry_delay_s(attempt, code, retry_after, (10.0, 100.0))

    in_an_hour = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    assert 9 <= (delay_s(1) or 0) <= 11
    assert 90 <= (delay_s(2) or 0) <= 110
    assert delay_s(3) is None
    assert delay_s(1, 410) is None
    assert delay_s(1, 503, "50") == 50
    assert 3500 < (delay_s(1, 429, in_an_hour) or 0) <= 3600
    assert delay_s(1, 503, "99999999999") == 86_400
    for unreadable in ("soon", "²", "-5", "nan", "", "Mon, 99 Nov 99999 00:00:00 GMT"):
        assert 9 <= (delay_s(1, 503, unreadable) or 0) <= 11, unreadable
    assert 9 <= (delay_s(1, 500, "50") or 0) <= 11, "Retry-After has an effect only with 429 and 503"


def test_the_default_schedule_is_that_of_the_standard() -> None:
    assert WebhooksSettings().retry_schedule_s == (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)


def drip(handler: BaseHTTPRequestHandler) -> None:
    """Send single bytes slowly, so that no single read takes long."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nx-slow: ")
    for _ in range(600):
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(0.05)


def hang(_: BaseHTTPRequestHandler) -> None:
    """Accept the request and send nothing until the client has disconnected."""
    time.sleep(2)


@pytest.mark.parametrize("answer", [drip, hang])
def test_a_receiver_that_takes_too_long_times_out_and_is_retried(
    database: Database, receiver: Receiver, start: Start, answer: object
) -> None:
    receiver.script(answer, status(200))
    job = ended_job(database, receiver.url)
    start(timeout_s=0.5)
    late, accepted = attempts_of(database, job, 2)
    assert (late.status_code, late.response_body) == (None, "no response within 0.5 s")
    assert accepted.status_code == 200


def test_a_response_counts_even_if_its_body_never_ends(database: Database, receiver: Receiver, start: Start) -> None:
    def send_part(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nthanks")
        handler.wfile.flush()

    receiver.script(send_part)
    job = ended_job(database, receiver.url)
    start()
    (attempt,) = attempts_of(database, job, 1)
    assert attempt.status_code == 200
    assert webhook(database, job)[0].delivered_at is not None


def test_only_the_beginning_of_a_long_response_is_stored(database: Database, receiver: Receiver, start: Start) -> None:
    receiver.script(status(200, b"a\0" * 1_000_000))
    job = ended_job(database, receiver.url)
    start()
    (attempt,) = attempts_of(database, job, 1)
    assert attempt.response_body == "a" * 500


def test_an_unreachable_receiver_is_recorded(database: Database, receiver: Receiver, start: Start) -> None:
    job = ended_job(database, "http://127.0.0.1:9/hook")
    start()
    attempt = attempts_of(database, job, 1)[0]
    assert attempt.status_code is None
    assert attempt.response_body.startswith("ConnectError")


def test_a_name_with_several_addresses_is_reached_at_the_one_that_accepts_connections(
    database: Database, receiver: Receiver, start: Start
) -> None:
    """`localhost` often resolves to ::1 first, and the server listens only on 127.0.0.1."""
    job = ended_job(database, receiver.url.replace("127.0.0.1", "localhost"))
    start()
    (attempt,) = attempts_of(database, job, 1)
    assert attempt.status_code == 200
    assert receiver.requests[0].headers["host"].startswith("localhost:")


def test_the_largest_body_stays_below_20_kb(database: Database, receiver: Receiver, start: Start) -> None:
    prompt = "\x01😀" * 8_192
    texts = dict.fromkeys(("system_prompt", "thinking_content", "assistant_content", "negative_prompt"), prompt)
    addresses = dict.fromkeys(("image", "mask"), f"https://example.com/{'x' * 2000}")
    rest = {"guidance_scale": 2, "metadata": {"note": "x" * 1000}, **texts, **addresses}
    job = ended_job(database, receiver.url, images=8, prompt=prompt, **rest)
    start()
    attempts_of(database, job, 1)
    (request,) = receiver.requests
    assert len(request.body) < 20_000
    outputs = request.document["data"]["outputs"]
    assert [(output["url"] is None, output["download_url"]) for output in outputs] == [(False, None)] * 8
    assert request.document["data"]["request"]["prompt"] == prompt[:1000] + "…"
    assert request.document["data"]["request"]["system_prompt"] == prompt[:100] + "…"


def test_a_short_prompt_is_sent_whole(database: Database, receiver: Receiver, start: Start) -> None:
    job = ended_job(database, receiver.url, prompt="x" * 1000)
    start()
    attempts_of(database, job, 1)
    assert receiver.requests[0].document["data"]["request"]["prompt"] == "x" * 1000


def test_canceled_and_failed_jobs_are_reported_too(database: Database, receiver: Receiver, start: Start) -> None:
    body = {"prompt": "x", "webhook_url": receiver.url}
    with database.write() as transaction:
        submission = parse_submission(body, GenerationDefaults(), RequestLimits())
        lifecycle.cancel(transaction, lifecycle.submit(transaction, submission, "anna", "0" * 64, 3).job.id)
        lifecycle.submit(transaction, submission, "anna", "0" * 64, 3)
        claimed = claims.claim(transaction, "a test", 60)
        assert claimed is not None
        failure = lifecycle.Failure("gpu_out_of_memory", "too large", False)
        lifecycle.fail(transaction, claims.lease_of(claimed), failure, 1)
    start()
    wait_until(lambda: len(receiver.requests) == 2)
    assert {request.document["type"] for request in receiver.requests} == {"job.canceled", "job.failed"}


def test_an_event_that_a_lost_deliverer_had_claimed_is_delivered_by_another(
    database: Database, receiver: Receiver, start: Start
) -> None:
    job = ended_job(database, receiver.url)
    with database.write() as transaction:
        (held,) = webhooks.claim_due(transaction, 8, hold_s=0.5)  # claimed; then its process dies
    start()
    (attempt,) = attempts_of(database, job, 1)
    assert attempt.number == held.attempt + 1 == 2


def test_several_deliverers_send_each_event_once(database: Database, receiver: Receiver, start: Start) -> None:
    jobs = [ended_job(database, receiver.url) for _ in range(30)]
    for _ in range(3):
        start()
    for job in jobs:
        attempts_of(database, job, 1)
    assert len(receiver.requests) == 30
    assert {request.document["data"]["id"] for request in receiver.requests} == {str(job.id) for job in jobs}


def test_concurrent_posts_are_limited_by_the_setting(database: Database, receiver: Receiver, start: Start) -> None:
    def slowly(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.05)
        status(200)(handler)

    receiver.script(slowly)
    jobs = [ended_job(database, receiver.url) for _ in range(8)]
    start(concurrency=2)
    for job in jobs:
        attempts_of(database, job, 1)
    assert receiver.max_concurrent <= 2
