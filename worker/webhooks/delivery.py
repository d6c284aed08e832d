"""Delivers due webhook events: signs, posts and records each, and retries it by schedule until the receiver accepts it.

A body is built when it is sent, so that its links are fresh; everything else is as it was when the job ended.
`zcore.jobs.lifecycle` decides which events exist.
"""

import asyncio
import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import httpx
import msgspec

from worker.backoff import pauses
from worker.outbound.addresses import Target, resolve
from worker.outbound.client import OutboundClient
from worker.periodic import PeriodicTask
from worker.shutdown import Shutdown
from worker.webhooks.retry_schedule import retry_delay_s
from worker.webhooks.signature import signature_headers
from zcore.errors import ForbiddenAddress
from zcore.jobs import webhooks
from zcore.jobs.database import Database, DatabaseError, temporary_fault
from zcore.jobs.resource import JobResource, MakeLink, WebhookPayload, WebhookType, linked
from zcore.jobs.webhooks import AttemptOutcome, DueWebhook
from zcore.settings import WebhooksSettings
from zcore.telemetry import log

MAX_STORED_RESPONSE_CHARACTERS = 500
MAX_READ_RESPONSE_BYTES = 4096
RESPONSE_BODY_TIMEOUT_S = 2.0
RECORD_BACKOFF_S = (0.1, 0.5, 1.0, 2.0, 5.0)
# A body stays below the 20 kB that Standard Webhooks asks for, even with eight images; the job's URL has the full text.
MAX_PROMPT_CHARACTERS = 1000
MAX_OTHER_TEXT_CHARACTERS = 100


@dataclass(frozen=True, slots=True)
class _Response:
    """What the receiver answered, or the error; `status_code` is None if no response arrived."""

    status_code: int | None
    text: str
    retry_after: str | None = None


class Deliverer:
    """A thread that claims due events, and a pool of threads that post them."""

    def __init__(
        self,
        database: Database,
        link: MakeLink,
        public_url: str,
        secret: str,
        settings: WebhooksSettings,
        interval_s: float,
        shutdown: Shutdown,
    ) -> None:
        """Look for due events every `interval_s` seconds, and after each `notify`."""
        self._database = database
        self._link = link
        self._public_url = public_url
        self._secret = secret
        self._settings = settings
        self._shutdown = shutdown
        self._free_threads = threading.Semaphore(settings.concurrency)
        self._pool = ThreadPoolExecutor(max_workers=settings.concurrency, thread_name_prefix="deliver")
        self._client = OutboundClient()
        self._task = PeriodicTask("webhook_delivery", self._deliver_due, interval_s, shutdown, run_at_start=True)

    def start(self) -> None:
        """Start delivering."""
        self._task.start()

    def notify(self) -> None:
        """Look for due events now."""
        self._task.trigger()

    def stop(self) -> None:
        """Stop delivering, and wait for the current posts. Another deliverer takes events that become due later."""
        self._task.stop()
        self._pool.shutdown(wait=True)

    def _deliver_due(self) -> None:
        """Claim due events, at most one per free thread, and submit them to the pool. Waits for a free thread."""
        free = 0
        while free < self._settings.concurrency and self._free_threads.acquire(blocking=free == 0):
            free += 1
        due: list[DueWebhook] = []
        try:
            with self._database.write() as transaction:
                due = webhooks.claim_due(transaction, free, hold_s=3 * self._settings.timeout_s)
        except DatabaseError as fault:
            log.warning("webhook.claim_failed", error=type(fault).__name__)
        for _ in range(free - len(due)):
            self._free_threads.release()
        for webhook in due:
            self._pool.submit(self._deliver, webhook)
        if due:
            self._task.trigger()  # more events may be due than threads were free

    def _deliver(self, webhook: DueWebhook) -> None:
        try:
            outcome = self._attempt(webhook)
            self._record(webhook, outcome)
            log.info(
                "webhook.delivered" if outcome.delivered else "webhook.attempt_failed",
                event_id=str(webhook.id),
                attempt=webhook.attempt,
                status_code=outcome.status_code,
            )
        except Exception as fault:
            # The attempt is not recorded, so the event is due again when its claim expires.
            log.error("webhook.attempt_crashed", event_id=str(webhook.id), exc_info=fault)
        finally:
            self._free_threads.release()

    def _record(self, webhook: DueWebhook, outcome: AttemptOutcome) -> None:
        """Record an attempt. While the database is away that is repeated, or a delivered event would be sent again.

        Raises `DatabaseError` if it is still away when the grace period of a shutdown ends.
        """
        is_repeated = False
        pauses_s = pauses(RECORD_BACKOFF_S)
        while True:
            try:
                with self._database.write() as transaction:
                    webhooks.record_attempt(transaction, webhook, outcome, is_repeated=is_repeated)
                return
            except DatabaseError as fault:
                if temporary_fault(fault) is None or self._shutdown.is_overdue:
                    raise
                log.warning("webhook.record_repeated", event_id=str(webhook.id), error=type(fault).__name__)
            is_repeated = True
            time.sleep(next(pauses_s))

    def _attempt(self, webhook: DueWebhook) -> AttemptOutcome:
        body = self._body(webhook)
        started = time.monotonic()
        try:
            target = resolve(webhook.url, self._settings)
            response = asyncio.run(self._post(webhook, target, body))
        except ForbiddenAddress as fault:
            response = _Response(None, fault.message)
        except TimeoutError:
            response = _Response(None, f"no response within {self._settings.timeout_s:g} s")
        except (httpx.HTTPError, httpx.InvalidURL) as fault:
            response = _Response(None, f"{type(fault).__name__}: {fault}")
        duration_ms = round((time.monotonic() - started) * 1000)
        delivered = response.status_code is not None and 200 <= response.status_code < 300
        retry_in_s = (
            None
            if delivered
            else retry_delay_s(
                webhook.attempt, response.status_code, response.retry_after, self._settings.retry_schedule_s
            )
        )
        return AttemptOutcome(delivered, response.status_code, response.text, duration_ms, retry_in_s)

    async def _post(self, webhook: DueWebhook, target: Target, body: bytes) -> _Response:
        # The database's time: receivers refuse what was signed by a clock that is some minutes wrong.
        signed_at = int(webhook.claimed_at.timestamp())
        headers = {
            "content-type": "application/json",
            "user-agent": "zimage-webhooks/1",
            **signature_headers(self._secret, str(webhook.id), signed_at, body),
        }
        async with self._client.stream("POST", target, headers, self._settings.timeout_s, body) as response:
            text = await _read_beginning(response)
            return _Response(response.status_code, text, response.headers.get("retry-after"))

    def _body(self, webhook: DueWebhook) -> bytes:
        resource = msgspec.convert(webhook.snapshot, JobResource)
        job = linked(resource, webhook.output_keys, self._public_url, self._link)
        request = {name: _shortened(name, value) for name, value in job.request.items()}
        # With temporary credentials a link to a bucket has 2 kB, so a second one per image would not fit.
        outputs = [msgspec.structs.replace(output, download_url=None) for output in job.outputs]
        job = msgspec.structs.replace(job, request=request, outputs=outputs)
        return msgspec.json.encode(WebhookPayload(cast(WebhookType, webhook.type), webhook.created_at, job))


def _shortened(name: str, value: Any) -> Any:
    """Return a field of the request; a long text is cut to its beginning."""
    limit = MAX_PROMPT_CHARACTERS if name == "prompt" else MAX_OTHER_TEXT_CHARACTERS
    return f"{value[:limit]}…" if isinstance(value, str) and len(value) > limit else value


async def _read_beginning(response: httpx.Response) -> str:
    """Return the beginning of the body, to be recorded. Only the status decides the outcome."""
    content = b""
    with contextlib.suppress(TimeoutError, httpx.HTTPError):
        async with asyncio.timeout(RESPONSE_BODY_TIMEOUT_S):
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) >= MAX_READ_RESPONSE_BYTES:
                    break
    return content.decode(errors="replace").replace("\x00", "")[:MAX_STORED_RESPONSE_CHARACTERS]
