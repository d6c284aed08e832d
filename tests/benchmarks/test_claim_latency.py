"""How long does it take from a job's submission to its claim by an idle worker?

Method: one real worker on the demo checkpoint, 40 jobs submitted one by one, each after the previous one has ended; the
first 5 are warm-up. The measure is `started_at - created_at` in database time, which includes the commit, the
notification, the broker and the claim. Measured for Redis with PostgreSQL, and for the embedded default (a folder,
SQLite).
"""

from datetime import datetime
from pathlib import Path

import httpx
import pytest

from tests.acceptance.installation import distributed, working
from tests.benchmarks.report import report, spread
from tests.integration.installation import Installation
from tests.services.s3 import Bucket

pytestmark = pytest.mark.benchmarks

JOBS = 40
WARM_UP = 5


def test_claim_latency_with_redis(tmp_path: Path, database_url: str, redis_url: str, s3: Bucket) -> None:
    samples = _latencies_ms(distributed(tmp_path, database_url, redis_url, s3, {}))
    report("ms from submission to claim, idle worker, PostgreSQL and Redis", ms=spread(samples))


def test_claim_latency_embedded(tmp_path: Path, sqlite_url: str) -> None:
    samples = _latencies_ms(Installation(tmp_path, {"database.url": sqlite_url}))
    report("ms from submission to claim, idle worker, SQLite and folder broker", ms=spread(samples))


def _latencies_ms(installation: Installation) -> list[float]:
    samples: list[float] = []
    body = {"prompt": "a red circle", "width": 64, "height": 64, "steps": 1}
    with (
        installation.serving() as server,
        working(installation, server, 1),
        httpx.Client(base_url=server.url, timeout=90) as client,
    ):
        for _ in range(JOBS):
            answer = client.post("/api/generate", json=body, headers={"prefer": "wait=60"})
            job = answer.json()
            assert job["status"] == "succeeded", job
            waited = datetime.fromisoformat(job["started_at"]) - datetime.fromisoformat(job["created_at"])
            samples.append(waited.total_seconds() * 1000)
    return samples[WARM_UP:]
