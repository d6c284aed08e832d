"""A customer's server, a record with ended jobs, and deliverers."""

import base64
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.integration.webhooks.receiver import Receiver, receiving
from tests.waiting import wait_until
from worker.deliver import Deliverer
from worker.shutdown import Shutdown
from zcore.jobs import lifecycle, queries
from zcore.jobs.database import Database
from zcore.jobs.lifecycle import StoredOutput
from zcore.jobs.models import Job, WebhookAttempt, WebhookEvent
from zcore.request import GenerationDefaults, RequestLimits, parse_submission
from zcore.settings import WebhooksSettings
from zcore.storage import Link

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
PUBLIC_URL = "https://pictures.example"

Start = Callable[..., Deliverer]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A customer's server."""
    with receiving() as started:
        yield started


@pytest.fixture
def database(each_database_url: str) -> Iterator[Database]:
    """An empty record, on SQLite and on PostgreSQL."""
    with closing(Database(each_database_url)) as opened:
        yield opened


@pytest.fixture
def start(database: Database) -> Iterator[Start]:
    """Starts deliverers, which end with the test."""
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


def link(key: str) -> Link:
    """A link as long as a bucket's."""
    return Link(f"https://bucket.example/{key}?signature={'s' * 400}", datetime.now(UTC) + timedelta(hours=1))


def ended_job(database: Database, url: str, pictures: int = 1, **fields: Any) -> Job:
    """A succeeded job whose caller is due to be told."""
    body = {"prompt": "a fox in snow", "webhook_url": url, "n": pictures, **fields}
    submission = parse_submission(body, GenerationDefaults(), RequestLimits())
    with database.write() as transaction:
        job = lifecycle.submit(transaction, submission, "anna", "0" * 64, 3).job
        claimed = lifecycle.claim(transaction, "a test", 60)
        assert claimed is not None
        outputs = [
            StoredOutput(i, f"jobs/{job.id}/1-{i}.png", "png", 1024, 1024, 1_234_567, "a" * 64, 2**62 + i)
            for i in range(pictures)
        ]
        engine = {f"part_{i}": "x" * 40 for i in range(13)}
        ended = lifecycle.complete(transaction, lifecycle.lease_of(claimed), outputs, {"total_ms": 5}, engine, 600)
    assert ended is not None
    return ended


def webhook(database: Database, job: Job) -> tuple[WebhookEvent, list[WebhookAttempt]]:
    """The one event of a job and its tries."""
    with database.read() as transaction:
        ((event, attempts),) = queries.timeline(transaction, job.id).webhooks
    return event, list(attempts)


def attempts_of(database: Database, job: Job, count: int) -> list[WebhookAttempt]:
    """The recorded tries, once there are `count`."""
    return wait_until(lambda: len(found := webhook(database, job)[1]) >= count and found) or []
