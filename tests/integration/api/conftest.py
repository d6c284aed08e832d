"""Real `python -m server` processes, and jobs that tests end in a worker's place."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.installation import Installation
from tests.services.postgres import Postgres
from zcore.jobs import lifecycle
from zcore.jobs.database import Database
from zcore.jobs.lifecycle import Failure, Lease, StoredOutput
from zcore.jobs.models import Job

KEYS = {"anna": "anna-key-0123456789", "ben": "ben-key-0123456789"}


@dataclass(frozen=True)
class Api:
    """A running server, its record, and who asks."""

    url: str
    database: Database
    installation: Installation
    client: httpx.Client
    headers: dict[str, str] = field(default_factory=dict)

    def as_(self, owner: str) -> "Api":
        """The same server, asked with this owner's key."""
        return replace(self, headers={"authorization": f"Bearer {KEYS[owner]}"})

    def get(self, path: str, **options: Any) -> httpx.Response:
        """One GET; an absolute address is taken as it is."""
        return self._ask("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        """One POST."""
        return self._ask("POST", path, **options)

    def submit(self, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        """One submission."""
        return self.post("/api/generate", json={"prompt": "a fox in snow", **fields}, headers=headers or {})

    def claim(self, job_id: str) -> Lease:
        """The lease of this job, whatever waits before it."""
        with self.database.write() as transaction:
            while (job := lifecycle.claim(transaction, "a test", 600)) is not None:
                if str(job.id) == job_id:
                    return lifecycle.lease_of(job)
        raise AssertionError(f"{job_id} was not in the queue")

    def succeed(self, job_id: str, content: bytes = b"\x89PNG", retention_s: float = 600) -> Job:
        """The job, ended with one picture."""
        lease = self.claim(job_id)
        folder = self.installation.folder / "storage" / "jobs" / job_id
        folder.mkdir(parents=True)
        (folder / "1-0.png").write_bytes(content)
        picture = StoredOutput(0, f"jobs/{job_id}/1-0.png", "png", 64, 64, len(content), "a" * 64, 42)
        with self.database.write() as transaction:
            job = lifecycle.complete(transaction, lease, [picture], {"total_ms": 5}, {"device": "cpu"}, retention_s)
        assert job is not None
        return job

    def fail(self, job_id: str) -> None:
        """The job, ended by a defect."""
        lease = self.claim(job_id)
        with self.database.write() as transaction:
            lifecycle.fail(transaction, lease, Failure("model_unavailable", "a file is missing", False), 1.0)

    def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        address = path if path.startswith("http") else f"{self.url}{path}"
        return self.client.request(
            method, address, **{**options, "headers": {**self.headers, **options.get("headers", {})}}
        )


@pytest.fixture(scope="package", params=["sqlite", "postgresql"])
def open_api(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, migrated_file: Path
) -> Iterator[Api]:
    """A server without keys, as `make run` starts it; once on SQLite and once on PostgreSQL."""
    folder = tmp_path_factory.mktemp("open")
    if request.param == "sqlite":
        shutil.copy(migrated_file, folder / "zimage.db")
        yield from _started(Installation(folder, {}))
        return
    postgres: Postgres = request.getfixturevalue("postgres")
    with postgres.database(request.getfixturevalue("migrated_template")) as url:
        yield from _started(Installation(folder, {"database.url": url}))


@pytest.fixture(scope="package")
def keyed_api(tmp_path_factory: pytest.TempPathFactory, postgres: Postgres, migrated_template: str) -> Iterator[Api]:
    """A server with two callers, on PostgreSQL."""
    with postgres.database(migrated_template) as url:
        given = {"database.url": url, "server.api_keys": KEYS}
        yield from _started(Installation(tmp_path_factory.mktemp("keyed"), given))


def _started(installation: Installation) -> Iterator[Api]:
    with installation.serving() as server, installation.database() as database, httpx.Client(timeout=60) as client:
        yield Api(server.url, database, installation, client)


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The RFC 9457 document of a refusal, held to its form."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("application/problem+json")
    document: dict[str, Any] = answer.json()
    assert document["status"] == status
    assert document["code"] == code
    assert document["type"] == f"urn:zimage:problem:{code}"
    assert document["title"]
    assert document["detail"]
    assert document["instance"] == answer.request.url.path
    return document


def pointers(document: dict[str, Any]) -> set[str]:
    """Which fields a problem names."""
    return {error["pointer"] for error in document["errors"]}
