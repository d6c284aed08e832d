"""A webhook receiver, a database with ended jobs, and deliverers."""

import base64
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.integration.webhooks.receiver import Receiver, receiving
from tests.waiting import wait_until
from worker.shutdown import Shutdown
from worker.webhooks.delivery import Deliverer
from zcore.jobs import claims, lifecycle, queries
from zcore.jobs.database import Database
from zcore.jobs.lifecycle import StoredOutput
from zcore.jobs.models import Job, WebhookAttempt, WebhookEvent
from zcore.request import GenerationDefaults, RequestLimits, parse_submission
from zcore.settings import WebhooksSettings
from zcore.storage import Link

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
PUBLIC_URL = "https://images.example"

Start = Callable[..., Deliverer]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A server that receives webhooks."""
    with receiving() as started:
        yield started


@pytest.fixture
def database(each_database_url: str) -> Iterator[Database]:
    """An empty database, on SQLite and on PostgreSQL."""
    with closing(Database(each_database_url)) as opened:
        yield opened


@pytest.fixture
def start(database: Database) -> Iterator[Start]:
    """A function that starts deliverers, which are stopped after the test."""
    with ExitStack() as stack:

        def started(**changed: Any) -> Deliverer:
            settings = WebhooksSettings(
                **{"timeout_s": 5.0, "allow_private_addresses": True, "retry_schedule_s": (0.05, 0.05, 0.05), **changed}
            )
            shutdown = Shutdown(grace_s=0)
            deliverer = Deliverer(database, link, PUBLIC_URL, SECRET, settings, interval_s=0.05, shutdown=shutdown)
            stack.callback(deliverer.stop)
            stack.callback(shutdown.begin)
            deliverer.start()
            return deliverer

        yield started


def link(key: str, name: str) -> Link:
    """Return a link as long as a signed link to a bucket."""
    url = f"https://bucket.example/{key}?name={name}&signature={'s' * 400}"
    return Link(url, f"{url}&download", datetime.now(UTC) + timedelta(hours=1))


def ended_job(database: Database, url: str, images: int = 1, **fields: Any) -> Job:
    """Return a succeeded job whose webhook event is due."""
    body = {"prompt": "a fox in snow", "webhook_url": url, "n": images, **fields}
    submission = parse_submission(body, GenerationDefaults(), RequestLimits())
    with database.write() as transaction:
        job = lifecycle.submit(transaction, submission, "anna", "0" * 64, 3).job
        claimed = claims.claim(transaction, "a test", 60)
        assert claimed is not None
        outputs = [
            StoredOutput(i, f"jobs/{job.id}/1-{i}.png", "png", 1024, 1024, 1_234_567, "a" * 64, 2**62 + i)
            for i in range(images)
        ]
        engine = {f"part_{i}": "x" * 40 for i in range(13)}
        ended = lifecycle.complete(transaction, claims.lease_of(claimed), outputs, {"total_ms": 5}, engine, 600)
    assert ended is not None
    return ended


def webhook(database: Database, job: Job) -> tuple[WebhookEvent, list[WebhookAttempt]]:
    """Return the webhook event of a job and its attempts."""
    with database.read() as transaction:
        ((event, attempts),) = queries.timeline(transaction, job.id).webhooks
    return event, list(attempts)


def attempts_of(database: Database, job: Job, count: int) -> list[WebhookAttempt]:
    """Wait for `count` recorded attempts, and return all."""
    return wait_until(lambda: len(found := webhook(database, job)[1]) >= count and found) or []
