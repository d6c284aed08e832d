"""An ended job's caller is told: signed, again and again by schedule, each try on record."""

import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from tests.integration.webhooks.conftest import SECRET, Start, attempts_of, ended_job, webhook
from tests.integration.webhooks.receiver import Receiver, receiving, status
from tests.waiting import wait_until
from worker.deliver import _Answer, retry_delay_s
from zcore.jobs import lifecycle, webhooks
from zcore.jobs.database import Database
from zcore.request import GenerationDefaults, RequestLimits, parse_submission
from zcore.settings import WebhooksSettings


def test_what_arrives_is_verified_by_the_standards_own_package(
    database: Database, receiver: Receiver, start: Start
) -> None:
    job = ended_job(database, receiver.url, metadata={"order": "A-1001"})
    start()
    attempts_of(database, job, 1)
    (told,) = receiver.told
    document = Webhook(SECRET).verify(told.body, told.headers)
    assert document["type"] == "job.succeeded"
    assert document["data"]["id"] == str(job.id)
    assert document["data"]["metadata"] == {"order": "A-1001"}
    assert document["data"]["outputs"][0]["url"].startswith("https://bucket.example/jobs/")
    assert document["data"]["urls"]["self"] == f"https://pictures.example/api/jobs/{job.id}"
    assert told.headers["content-type"] == "application/json"
    assert told.headers["host"] == receiver.url.split("/")[2]


def test_a_changed_body_or_another_secret_does_not_verify(database: Database, receiver: Receiver, start: Start) -> None:
    job = ended_job(database, receiver.url)
    start()
    attempts_of(database, job, 1)
    (told,) = receiver.told
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(told.body.replace(b"job.succeeded", b"job.failedxxx"), told.headers)
    with pytest.raises(WebhookVerificationError):
        Webhook("whsec_" + "b" * 44).verify(told.body, told.headers)


def test_a_delivered_event_is_on_record_and_not_sent_again(
    database: Database, receiver: Receiver, start: Start
) -> None:
    receiver.script(status(204))
    job = ended_job(database, receiver.url)
    start()
    (attempt,) = attempts_of(database, job, 1)
    event, _ = webhook(database, job)
    assert (attempt.number, attempt.status_code) == (1, 204)
    assert (event.delivered_at is not None, event.next_attempt_at) == (True, None)
    second = ended_job(database, receiver.url)
    attempts_of(database, second, 1)
    assert len(receiver.told) == 2, "each once"


def test_a_refused_event_is_sent_again_by_schedule_under_the_same_id(
    database: Database, receiver: Receiver, start: Start
) -> None:
    receiver.script(status(500, b"first"), status(404, b"second"), status(200, b"third"))
    job = ended_job(database, receiver.url)
    start()
    attempts = attempts_of(database, job, 3)
    assert [(a.number, a.status_code, a.answer) for a in attempts] == [
        (1, 500, "first"), (2, 404, "second"), (3, 200, "third"),
    ]  # fmt: skip
    assert len({told.headers["webhook-id"] for told in receiver.told}) == 1
    for told in receiver.told:
        Webhook(SECRET).verify(told.body, told.headers)
    assert webhook(database, job)[0].delivered_at is not None


def test_after_the_whole_schedule_an_event_is_dead_and_can_be_sent_again_by_hand(
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
        webhooks.resend(transaction, event.id)
    attempts_of(database, job, 5)
    assert webhook(database, job)[0].delivered_at is not None


def test_a_redirect_is_a_failure_and_not_followed(database: Database, receiver: Receiver, start: Start) -> None:
    with receiving() as elsewhere:
        receiver.script(status(307, location=elsewhere.url), status(200))
        job = ended_job(database, receiver.url)
        start()
        attempts = attempts_of(database, job, 2)
        assert [attempt.status_code for attempt in attempts] == [307, 200]
        assert elsewhere.told == []


def test_gone_ends_it(database: Database, receiver: Receiver, start: Start) -> None:
    receiver.script(status(410))
    job = ended_job(database, receiver.url)
    start()
    attempts_of(database, job, 1)
    event, _ = webhook(database, job)
    assert (event.next_attempt_at, event.delivered_at) == (None, None)


@pytest.mark.parametrize("code", [429, 503])
def test_a_receiver_may_ask_for_time(database: Database, receiver: Receiver, start: Start, code: int) -> None:
    receiver.script(status(code, retry_after="3600"))
    job = ended_job(database, receiver.url)
    start()
    attempts_of(database, job, 1)
    event, (attempt,) = webhook(database, job)
    assert event.next_attempt_at is not None
    assert event.next_attempt_at - attempt.at == timedelta(hours=1)


def test_how_long_until_the_next_try() -> None:
    def wait_s(attempt: int, code: int | None = 500, retry_after: str | None = None) -> float | None:
        return retry_delay_s(attempt, _Answer(code, "", retry_after), (10.0, 100.0))

    in_an_hour = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    assert 9 <= (wait_s(1) or 0) <= 11
    assert 90 <= (wait_s(2) or 0) <= 110
    assert wait_s(3) is None
    assert wait_s(1, 410) is None
    assert wait_s(1, 503, "50") == 50
    assert 3500 < (wait_s(1, 429, in_an_hour) or 0) <= 3600
    assert wait_s(1, 503, "99999999999") == 86_400
    for unreadable in ("soon", "²", "-5", "nan", "", "Mon, 99 Nov 99999 00:00:00 GMT"):
        assert 9 <= (wait_s(1, 503, unreadable) or 0) <= 11, unreadable
    assert 9 <= (wait_s(1, 500, "50") or 0) <= 11, "only who asks for time is given it"


def test_the_default_schedule_is_the_standards() -> None:
    assert WebhooksSettings().retry_schedule_s == (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)


def drip(handler: BaseHTTPRequestHandler) -> None:
    """A byte now and then, for ever: no single wait of it is long."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nx-slow: ")
    for _ in range(600):
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(0.05)


def hang(_: BaseHTTPRequestHandler) -> None:
    """Takes the request and says nothing until nobody listens any longer."""
    time.sleep(2)


@pytest.mark.parametrize("answer", [drip, hang])
def test_a_receiver_that_takes_too_long_is_given_up(
    database: Database, receiver: Receiver, start: Start, answer: object
) -> None:
    receiver.script(answer, status(200))  # type: ignore[arg-type]
    job = ended_job(database, receiver.url)
    start(timeout_s=0.5)
    late, taken = attempts_of(database, job, 2)
    assert (late.status_code, late.answer) == (None, "no answer within 0.5 s")
    assert taken.status_code == 200


def test_an_answer_counts_also_when_its_body_never_ends(database: Database, receiver: Receiver, start: Start) -> None:
    def half(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nthanks")
        handler.wfile.flush()

    receiver.script(half)
    job = ended_job(database, receiver.url)
    start()
    (attempt,) = attempts_of(database, job, 1)
    assert attempt.status_code == 200
    assert webhook(database, job)[0].delivered_at is not None


def test_of_a_long_answer_only_the_beginning_is_kept(database: Database, receiver: Receiver, start: Start) -> None:
    receiver.script(status(200, b"a\0" * 1_000_000))
    job = ended_job(database, receiver.url)
    start()
    (attempt,) = attempts_of(database, job, 1)
    assert attempt.answer == "a" * 500


def test_nobody_there_is_on_record_too(database: Database, receiver: Receiver, start: Start) -> None:
    job = ended_job(database, "http://127.0.0.1:9/hook")
    start()
    attempt = attempts_of(database, job, 1)[0]
    assert attempt.status_code is None
    assert attempt.answer.startswith("ConnectError")


def test_a_name_with_several_addresses_is_reached_at_the_one_that_answers(
    database: Database, receiver: Receiver, start: Start
) -> None:
    """`localhost` is often ::1 first, and the server listens on 127.0.0.1 alone."""
    job = ended_job(database, receiver.url.replace("127.0.0.1", "localhost"))
    start()
    (attempt,) = attempts_of(database, job, 1)
    assert attempt.status_code == 200
    assert receiver.told[0].headers["host"].startswith("localhost:")


def test_the_largest_body_stays_below_20_kb(database: Database, receiver: Receiver, start: Start) -> None:
    prompt = "\x01😀" * 8_192
    texts = dict.fromkeys(("system_prompt", "thinking_content", "assistant_content", "negative_prompt"), prompt)
    addresses = dict.fromkeys(("image", "mask"), f"https://example.com/{'x' * 2000}")
    rest = {"guidance_scale": 2, "metadata": {"note": "x" * 1000}, **texts, **addresses}
    job = ended_job(database, receiver.url, pictures=8, prompt=prompt, **rest)
    start()
    attempts_of(database, job, 1)
    (told,) = receiver.told
    assert len(told.body) < 20_000
    assert len(told.document["data"]["outputs"]) == 8
    assert told.document["data"]["request"]["prompt"] == prompt[:1000] + "…"
    assert told.document["data"]["request"]["system_prompt"] == prompt[:100] + "…"


def test_a_short_prompt_is_told_whole(database: Database, receiver: Receiver, start: Start) -> None:
    job = ended_job(database, receiver.url, prompt="x" * 1000)
    start()
    attempts_of(database, job, 1)
    assert receiver.told[0].document["data"]["request"]["prompt"] == "x" * 1000


def test_canceled_and_failed_jobs_are_told_too(database: Database, receiver: Receiver, start: Start) -> None:
    body = {"prompt": "x", "webhook_url": receiver.url}
    with database.write() as transaction:
        submission = parse_submission(body, GenerationDefaults(), RequestLimits())
        lifecycle.cancel(transaction, lifecycle.submit(transaction, submission, "anna", "0" * 64, 3).job.id)
        lifecycle.submit(transaction, submission, "anna", "0" * 64, 3)
        claimed = lifecycle.claim(transaction, "a test", 60)
        assert claimed is not None
        failure = lifecycle.Failure("gpu_out_of_memory", "too large", False)
        lifecycle.fail(transaction, lifecycle.lease_of(claimed), failure, 1)
    start()
    wait_until(lambda: len(receiver.told) == 2)
    assert {told.document["type"] for told in receiver.told} == {"job.canceled", "job.failed"}


def test_what_a_lost_deliverer_held_is_delivered_by_another(
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
    assert len(receiver.told) == 30
    assert {told.document["data"]["id"] for told in receiver.told} == {str(job.id) for job in jobs}


def test_not_more_are_sent_at_once_than_the_operator_allows(
    database: Database, receiver: Receiver, start: Start
) -> None:
    def slowly(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.05)
        status(200)(handler)

    receiver.script(slowly)
    jobs = [ended_job(database, receiver.url) for _ in range(8)]
    start(concurrency=2)
    for job in jobs:
        attempts_of(database, job, 1)
    assert receiver.most_at_once <= 2
