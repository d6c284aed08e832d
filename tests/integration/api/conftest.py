"""Fixtures: real `python -m server` processes, and jobs that tests complete in place of a worker."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api_description import Description
from tests.integration.installation import Installation
from tests.services.postgres import Postgres
from zcore.jobs import claims, lifecycle
from zcore.jobs.claims import Lease
from zcore.jobs.database import Database
from zcore.jobs.lifecycle import Failure, StoredOutput
from zcore.jobs.models import Job

KEYS = {"anna": "anna-key-0123456789", "ben": "ben-key-0123456789"}
LIMITS = {"limits.max_pixels": 1024 * 1024}
"""Enough for the requests of the documentation, which the limit of the demo profile refuses."""


@dataclass(frozen=True)
class Api:
    """A running server, its database, and the headers of the caller. Every response is compared with the document."""

    url: str
    database: Database
    installation: Installation
    client: httpx.Client
    description: Description
    headers: dict[str, str] = field(default_factory=dict)

    def as_(self, owner: str) -> "Api":
        """Return the same server, called with this owner's key."""
        return replace(self, headers={"authorization": f"Bearer {KEYS[owner]}"})

    def get(self, path: str, **options: Any) -> httpx.Response:
        """Send a GET request to a path or an absolute URL."""
        return self._request("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        """Send a POST request to a path or an absolute URL."""
        return self._request("POST", path, **options)

    def submit(self, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        """Submit a job."""
        return self.post("/api/generate", json={"prompt": "a fox in snow", **fields}, headers=headers or {})

    def claim(self, job_id: str) -> Lease:
        """Claim this job, and every job before it in the queue."""
        with self.database.write() as transaction:
            while (job := claims.claim(transaction, "a test", 600)) is not None:
                if str(job.id) == job_id:
                    return claims.lease_of(job)
        raise AssertionError(f"{job_id} was not in the queue")

    def succeed(self, job_id: str, content: bytes = b"\x89PNG", retention_s: float = 600) -> Job:
        """Complete the job with one image."""
        lease = self.claim(job_id)
        folder = self.installation.folder / "storage" / "jobs" / job_id
        folder.mkdir(parents=True)
        (folder / "1-0.png").write_bytes(content)
        image = StoredOutput(0, f"jobs/{job_id}/1-0.png", "png", 64, 64, len(content), "a" * 64, 42)
        with self.database.write() as transaction:
            job = lifecycle.complete(transaction, lease, [image], {"total_ms": 5}, {"device": "cpu"}, retention_s)
        assert job is not None
        return job

    def fail(self, job_id: str) -> None:
        """Fail the job with an error that is not retryable."""
        lease = self.claim(job_id)
        with self.database.write() as transaction:
            lifecycle.fail(transaction, lease, Failure("model_unavailable", "a file is missing", False), 1.0)

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        url = path if path.startswith("http") else f"{self.url}{path}"
        response = self.client.request(
            method, url, **{**options, "headers": {**self.headers, **options.get("headers", {})}}
        )
        assert self.description.undeclared(response) == []
        return response


@pytest.fixture(scope="package", params=["sqlite", "postgresql"])
def open_api(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, migrated_file: Path
) -> Iterator[Api]:
    """A server without API keys, as started by `make run`; on SQLite and on PostgreSQL."""
    folder = tmp_path_factory.mktemp("open")
    if request.param == "sqlite":
        shutil.copy(migrated_file, folder / "zimage.db")
        yield from _running(Installation(folder, LIMITS))
        return
    postgres: Postgres = request.getfixturevalue("postgres")
    with postgres.database(request.getfixturevalue("migrated_template")) as url:
        yield from _running(Installation(folder, {"database.url": url, **LIMITS}))


@pytest.fixture(scope="package")
def keyed_api(tmp_path_factory: pytest.TempPathFactory, postgres: Postgres, migrated_template: str) -> Iterator[Api]:
    """A server with two API keys, on PostgreSQL."""
    with postgres.database(migrated_template) as url:
        given = {"database.url": url, "server.api_keys": KEYS, **LIMITS}
        yield from _running(Installation(tmp_path_factory.mktemp("keyed"), given))


def _running(installation: Installation) -> Iterator[Api]:
    with installation.serving() as server, installation.database() as database, httpx.Client(timeout=60) as client:
        description = Description(client.get(f"{server.url}/schema/openapi.json").json())
        yield Api(server.url, database, installation, client, description)


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Check that the response is an RFC 9457 problem with this status and code. Returns its document."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("application/problem+json")
    document: dict[str, Any] = answer.json()
    assert document["status"] == status
    assert document["code"] == code
    assert document["type"] == f"urn:zimage:problem:{code}"
    assert document["title"]
    assert document["detail"]
    assert document["request_id"] == answer.headers["x-request-id"]
    assert document["instance"] == answer.request.url.path
    return document


def pointers(document: dict[str, Any]) -> set[str]:
    """Return the JSON pointers of a problem's errors in the body."""
    assert all(error["in"] == "body" for error in document["errors"])
    return {error["pointer"] for error in document["errors"]}


def named(document: dict[str, Any]) -> set[tuple[str, str]]:
    """Return the place and the name of a problem's errors outside the body."""
    return {(error["in"], error["name"]) for error in document["errors"]}
