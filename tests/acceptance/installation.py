"""A distributed installation: PostgreSQL, Redis and a bucket, with workers that the tests wait for."""

from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.integration.installation import Installation, Server
from tests.services.process import Running
from tests.services.s3 import Bucket
from tests.waiting import wait_until

WEBHOOK_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
STARTED_WITHIN_S = 120.0


def distributed(
    folder: Path, database_url: str, redis_url: str, bucket: Bucket, settings: Mapping[str, Any]
) -> Installation:
    """Return an installation with the demo profile on these services; `settings` adds settings by dotted name."""
    return Installation(
        folder,
        {
            "database.url": database_url,
            "broker.url": redis_url,
            "storage.bucket": bucket.name,
            "storage.endpoint_url": bucket.endpoint_url,
            "storage.access_key_id": bucket.access_key_id,
            "storage.secret_access_key": bucket.secret_access_key,
            "webhooks.secret": WEBHOOK_SECRET,
            **settings,
        },
    )


@contextmanager
def working(installation: Installation, server: Server, count: int) -> Generator[list[Running]]:
    """Run `count` workers, and enter the block when all of them are present."""

    def present() -> int:
        for worker in workers:
            worker.check()
        return int(httpx.get(f"{server.url}/health/ready", timeout=5).json()["workers"])

    with ExitStack() as stack:
        workers: list[Running] = []
        before = present()
        workers += [stack.enter_context(installation.working(name=f"worker-{number}")) for number in range(count)]
        wait_until(lambda: present() == before + count, STARTED_WITHIN_S)
        yield workers
