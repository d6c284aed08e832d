"""Telling callers: due webhook events are signed, posted and recorded, again and again by schedule until one is taken.

Takes the database, links to pictures and the webhook settings. Signatures and headers follow Standard Webhooks 1.0.0
(standardwebhooks.com, MIT). A body is composed when it is sent, so that its links are fresh; its facts are those of the
moment when the job ended. Does not decide what callers are told of: `lifecycle` does.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import msgspec
from sqlalchemy.exc import SQLAlchemyError

from worker.addresses import ForbiddenAddress, Target, resolve
from worker.outbound import Outbound
from worker.shutdown import Shutdown
from zcore.jobs import webhooks
from zcore.jobs.database import Database
from zcore.jobs.resource import JobResource, Link, linked
from zcore.jobs.webhooks import AttemptOutcome, DueWebhook
from zcore.keys import WEBHOOK_SECRET_PREFIX
from zcore.settings import WebhooksSettings
from zcore.telemetry import log

ANSWER_KEPT_CHARACTERS = 500
ANSWER_READ_BYTES = 4096
ANSWER_WITHIN_S = 2.0
# A body stays below the 20 kB that Standard Webhooks asks for, with eight pictures too; the job's address has the rest.
PROMPT_TOLD_CHARACTERS = 1000
OTHER_TEXT_TOLD_CHARACTERS = 100
JITTER = 0.1
LONGEST_RETRY_AFTER_S = 86_400.0
GONE = 410
WAIT_ASKED = (429, 503)


class Deliverer:
    """A thread that looks for due events and a pool that posts them."""

    def __init__(
        self,
        database: Database,
        link: Callable[[str], Link],
        public_url: str,
        secret: str,
        settings: WebhooksSettings,
        interval_s: float,
        shutdown: Shutdown,
    ) -> None:
        """`interval_s` is how often the database is asked when nobody calls `wake`."""
        self._database = database
        self._link = link
        self._public_url = public_url
        self._secret = secret
        self._settings = settings
        self._interval_s = interval_s
        self._shutdown = shutdown
        self._woken = threading.Event()
        self._free = threading.Semaphore(settings.concurrency)
        self._pool = ThreadPoolExecutor(max_workers=settings.concurrency, thread_name_prefix="deliver")
        self._outbound = Outbound()
        self._thread = threading.Thread(target=self._run, name="deliverer", daemon=True)

    def start(self) -> None:
        """Delivers from now on."""
        self._thread.start()

    def wake(self) -> None:
        """Something may be due now."""
        self._woken.set()

    def stop(self) -> None:
        """Waits for the posts under way; what is due after that is another deliverer's."""
        self._woken.set()
        self._thread.join()
        self._pool.shutdown(wait=True)

    def _run(self) -> None:
        while not self._shutdown.is_begun:
            if not self._deliver_some():
                self._woken.wait(self._interval_s)
                self._woken.clear()

    def _deliver_some(self) -> bool:
        """Hands at most as many events to the pool as it has free threads; whether there were any."""
        slots = 0
        while slots < self._settings.concurrency and self._free.acquire(blocking=slots == 0):
            slots += 1
        due: list[DueWebhook] = []
        try:
            with self._database.write() as transaction:
                due = webhooks.claim_due(transaction, slots, hold_s=3 * self._settings.timeout_s)
        except SQLAlchemyError as fault:
            log.warning("webhooks.not_claimed", error=type(fault).__name__)
        for _ in range(slots - len(due)):
            self._free.release()
        for webhook in due:
            self._pool.submit(self._deliver, webhook)
        return bool(due)

    def _deliver(self, webhook: DueWebhook) -> None:
        try:
            outcome = self._try(webhook)
            with self._database.write() as transaction:
                webhooks.record_attempt(transaction, webhook, outcome)
            log.info(
                "webhook.attempted",
                event_id=str(webhook.id),
                attempt=webhook.attempt,
                delivered=outcome.delivered,
                status_code=outcome.status_code,
            )
        except Exception as fault:
            # Held, not recorded: it is due again when the hold is over.
            log.error("webhook.crashed", event_id=str(webhook.id), exc_info=fault)
        finally:
            self._free.release()

    def _try(self, webhook: DueWebhook) -> AttemptOutcome:
        body = self._body(webhook)
        began = time.monotonic()
        try:
            target = resolve(webhook.url, self._settings.allow_private_addresses)
            answer = asyncio.run(self._post(webhook, target, body))
        except ForbiddenAddress as fault:
            answer = _Answer(None, str(fault), None)
        except TimeoutError:
            answer = _Answer(None, f"no answer within {self._settings.timeout_s:g} s", None)
        except (httpx.HTTPError, httpx.InvalidURL) as fault:
            answer = _Answer(None, f"{type(fault).__name__}: {fault}", None)
        duration_ms = round((time.monotonic() - began) * 1000)
        delivered = answer.status_code is not None and 200 <= answer.status_code < 300
        retry_in_s = None if delivered else retry_delay_s(webhook.attempt, answer, self._settings.retry_schedule_s)
        return AttemptOutcome(delivered, answer.status_code, answer.text, duration_ms, retry_in_s)

    async def _post(self, webhook: DueWebhook, target: Target, body: bytes) -> "_Answer":
        headers = {
            "content-type": "application/json",
            "user-agent": "zimage-webhooks/1",
            **sign(self._secret, str(webhook.id), int(time.time()), body),
        }
        async with self._outbound.answer("POST", target, headers, self._settings.timeout_s, body) as response:
            text = await _beginning_of(response)
            return _Answer(response.status_code, text, response.headers.get("retry-after"))

    def _body(self, webhook: DueWebhook) -> bytes:
        resource = msgspec.convert(webhook.snapshot, JobResource)
        job = linked(resource, webhook.output_keys, self._public_url, self._link)
        job = msgspec.structs.replace(job, request={name: _told(name, value) for name, value in job.request.items()})
        return msgspec.json.encode({"type": webhook.type, "timestamp": webhook.created_at, "data": job})


def _told(name: str, value: Any) -> Any:
    """A field of the request: of a long text its beginning, anything else as it is."""
    at_most = PROMPT_TOLD_CHARACTERS if name == "prompt" else OTHER_TEXT_TOLD_CHARACTERS
    return f"{value[:at_most]}…" if isinstance(value, str) and len(value) > at_most else value


async def _beginning_of(response: httpx.Response) -> str:
    """For people to read; the status has said everything that matters."""
    content = b""
    with contextlib.suppress(TimeoutError, httpx.HTTPError):
        async with asyncio.timeout(ANSWER_WITHIN_S):
            async for piece in response.aiter_raw():
                content += piece
                if len(content) >= ANSWER_READ_BYTES:
                    break
    return content.decode(errors="replace").replace("\x00", "")[:ANSWER_KEPT_CHARACTERS]


@dataclass(frozen=True, slots=True)
class _Answer:
    """What came back. `status_code` None: nothing did."""

    status_code: int | None
    text: str
    retry_after: str | None


def sign(secret: str, event_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The three headers of Standard Webhooks.

    `secret` is `whsec_` and base64; `timestamp` is Unix seconds of this try.
    """
    key = base64.b64decode(secret.removeprefix(WEBHOOK_SECRET_PREFIX))
    signed = f"{event_id}.{timestamp}.".encode() + body
    signature = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return {"webhook-id": event_id, "webhook-timestamp": str(timestamp), "webhook-signature": f"v1,{signature}"}


def retry_delay_s(attempt: int, answer: _Answer, schedule_s: tuple[float, ...]) -> float | None:
    """Seconds until the next try after try number `attempt`; None when the event is dead.

    410 ends it; 429 and 503 are waited for as long as they ask, up to a day; the schedule is spread by 10 %.
    """
    if answer.status_code == GONE or attempt > len(schedule_s):
        return None
    planned = schedule_s[attempt - 1] * random.uniform(1 - JITTER, 1 + JITTER)
    asked = _seconds(answer.retry_after) if answer.status_code in WAIT_ASKED else 0.0
    return max(planned, min(asked, LONGEST_RETRY_AFTER_S))


def _seconds(retry_after: str | None) -> float:
    """RFC 9110: a number of seconds or a date; 0 where it is neither."""
    if retry_after is None:
        return 0.0
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(retry_after)
        return max(0.0, (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):
        return 0.0
