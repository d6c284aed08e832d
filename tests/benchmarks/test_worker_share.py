"""What fraction of a busy worker's wall time is spent outside the pipeline?

Method: 50 jobs wait; then one worker starts and drains them, with PostgreSQL, Redis and S3. Between the first claim and
the last completion, all time that is not encode, denoise or decode counts as outside. The limit is 0.
"""

from pathlib import Path

import httpx
import pytest
from sqlalchemy import func, select

from tests.acceptance.installation import distributed, working
from tests.benchmarks.report import report
from tests.integration.installation import Installation
from tests.services.s3 import Bucket
from tests.waiting import wait_until
from zcore.jobs.database import Database
from zcore.jobs.models import Job
from zcore.jobs.states import State

pytestmark = pytest.mark.benchmarks

JOBS = 50


@pytest.fixture
def installation(tmp_path: Path, database_url: str, redis_url: str, s3: Bucket) -> Installation:
    return distributed(tmp_path, database_url, redis_url, s3, {})


@pytest.mark.parametrize("side_px", [128, 256])
def test_worker_share(installation: Installation, database_url: str, side_px: int) -> None:
    database = Database(database_url)

    def succeeded() -> int:
        with database.read() as transaction:
            statement = select(func.count()).select_from(Job).where(Job.stored_status == State.SUCCEEDED)
            return transaction.session.scalar(statement) or 0

    body = {"prompt": "a red circle", "width": side_px, "height": side_px, "seed": 1}
    with installation.serving() as server:
        for _ in range(JOBS):
            assert httpx.post(f"{server.url}/api/generate", json=body, timeout=30).status_code == 202
        with working(installation, server, 1):
            wait_until(lambda: succeeded() == JOBS, timeout_s=300, every_s=0.2)
    with database.read() as transaction:
        jobs = transaction.session.scalars(select(Job)).all()
    database.close()
    began = min(job.started_at for job in jobs if job.started_at)
    ended = max(job.completed_at for job in jobs if job.completed_at)
    wall_s = (ended - began).total_seconds()
    inside_s = sum(job.metrics[phase] for job in jobs for phase in ("encode_ms", "denoise_ms", "decode_ms")) / 1000
    report(
        f"share of a worker's wall time outside the pipeline, {JOBS} jobs waiting, {side_px} px",
        wall_s=round(wall_s, 2),
        inside_s=round(inside_s, 2),
        outside_share=round(1 - inside_s / wall_s, 3),
        images_per_s=round(JOBS / wall_s, 2),
    )
