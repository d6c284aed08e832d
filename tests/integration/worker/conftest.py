"""A record, a folder of pictures, and a generator with a painter in place of the model."""

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.integration.worker.painter import Bell, Painter, Scribe, read_embedding, write_embedding
from tests.waiting import wait_until
from worker.encode import Encoder
from worker.generate import Generator
from worker.inputs import InputSource
from worker.loop import Workplace
from worker.shutdown import Shutdown
from zcore.errors import StorageError
from zcore.jobs import lifecycle, queries
from zcore.jobs.database import Database
from zcore.jobs.models import Job
from zcore.request import GenerationDefaults, RequestLimits, parse_submission
from zcore.settings import JobsSettings, WebhooksSettings, WorkerSettings
from zcore.stages import Stage
from zcore.storage import DirectoryStorage


class ShakyStorage(DirectoryStorage):
    """A folder that takes nothing while it is down, and calls `after_put` when it has taken something."""

    is_down = False
    after_put: Callable[[str], None] = staticmethod(lambda _key: None)
    refused = 0
    root: Path

    def put(self, key: str, content: bytes, content_type: str) -> None:
        if self.is_down:
            self.refused += 1
            raise StorageError(f"{key}: the store is down")
        super().put(key, content, content_type)
        self.after_put(key)

    def pictures(self) -> list[str]:
        """Every key there is."""
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file())


@dataclass
class Studio:
    """All that a worker works with, in this process."""

    database: Database
    storage: ShakyStorage
    painter: Painter
    scribe: Scribe
    bell: Bell
    ended: threading.Event
    broken: threading.Event = field(default_factory=threading.Event)
    web: WebhooksSettings = field(default_factory=lambda: WebhooksSettings(allow_private_addresses=True))

    def generator(
        self, grace_s: float = 60, name: str = "worker-1", painter: Painter | None = None, **changed: Any
    ) -> tuple[Generator, Shutdown]:
        """A worker, and its wish to end."""
        place = self.workplace(name, grace_s, **changed)
        inputs = InputSource(self.database, self.storage, self.web, RequestLimits().max_input_bytes)
        made = Generator(painter or self.painter, read_embedding, inputs, place)  # type: ignore[arg-type]
        return made, place.shutdown

    def encoder(
        self, grace_s: float = 60, name: str = "encoder-1", scribe: Scribe | None = None, **changed: Any
    ) -> tuple[Encoder, Shutdown]:
        """A worker that only encodes, and its wish to end."""
        place = self.workplace(name, grace_s, stages=(Stage.ENCODE,), **changed)
        return Encoder(scribe or self.scribe, write_embedding, place), place.shutdown

    def workplace(self, name: str, grace_s: float, **changed: Any) -> Workplace:
        """What either works with."""
        given = {"lease_s": 30.0, "retry_delay_s": 0.0, "upload_retry_s": 30.0, "progress_interval_s": 0.02, **changed}
        jobs = JobsSettings(lease_s=given.pop("lease_s"), retry_delay_s=given.pop("retry_delay_s"), retention_s=600)
        return Workplace(
            self.database,
            self.storage,
            jobs,
            WorkerSettings(**given),
            name,
            Shutdown(grace_s),
            self.bell,
            self.ended.set,
            self.broken.set,
        )

    def work(self, **changed: Any) -> int:
        """Everything that is due, painted and stored; the number of jobs taken."""
        generator, _ = self.generator(**changed)
        taken = generator.drain()
        generator.finish()
        return taken

    def encode(self, **changed: Any) -> int:
        """Every prompt that is due, encoded and stored; the number of jobs taken."""
        encoder, _ = self.encoder(**changed)
        return encoder.drain()

    def submit(self, max_attempts: int = 3, stage: Stage = Stage.GENERATE, **fields: Any) -> UUID:
        """A queued job."""
        body = {"prompt": "a fox", "width": 64, "height": 64, "steps": 4, **fields}
        submission = parse_submission(body, GenerationDefaults(), RequestLimits())
        with self.database.write() as transaction:
            return lifecycle.submit(transaction, submission, "anna", "0" * 64, max_attempts, stage=stage).job.id

    def look(self, job_id: UUID) -> Job:
        """The row as it stands."""
        with self.database.read() as transaction:
            return queries.get(transaction, job_id)

    def events(self, job_id: UUID) -> list[str]:
        """What happened to it."""
        with self.database.read() as transaction:
            return [event.type for event in queries.timeline(transaction, job_id).events]

    def cancel(self, job_id: UUID) -> None:
        """The wish to cancel."""
        with self.database.write() as transaction:
            lifecycle.cancel(transaction, job_id)

    def wait_for_a_beat(self, job_id: UUID) -> None:
        """Until the worker has renewed its lease once more, and so has read what the row says."""
        before = self.look(job_id).lease_until
        wait_until(lambda: self.look(job_id).lease_until != before)

    def lose(self, job_id: UUID) -> None:
        """The lease runs out, as if its worker had been silent for too long; another worker has the job."""
        with self.database.write() as transaction:
            job = queries.get(transaction, job_id)
            job.lease_until = transaction.now.replace(year=2000)
            transaction.session.flush()
            lifecycle.rescue(transaction)
            claimed = lifecycle.claim(transaction, "worker-2", 600)
        assert claimed is not None
        assert claimed.id == job_id


@pytest.fixture
def studio(each_database_url: str, tmp_path: Path) -> Iterator[Studio]:
    """On SQLite and on PostgreSQL."""
    storage = ShakyStorage(tmp_path / "storage", "http://127.0.0.1:8000", "key", link_expiry_s=60)
    storage.root = tmp_path / "storage"
    storage.prepare()
    with closing(Database(each_database_url)) as database:
        yield Studio(database, storage, Painter(), Scribe(), Bell(), threading.Event())
