"""A database, a storage folder, and workers with stand-ins for the model, in the test process."""

import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import update

from tests.integration.worker.stand_in_pipeline import (
    Notifications,
    StandInEncoder,
    StandInPipeline,
    read_embedding,
    write_embedding,
)
from worker.context import WorkerContext
from worker.image_worker import ImageWorker
from worker.inputs.fetch import InputSource
from worker.inputs.lora_cache import LoraCache
from worker.maintenance import tasks
from worker.maintenance.scheduler import Maintenance
from worker.patient_storage import PatientStorage
from worker.prompt_worker import PromptWorker
from worker.shutdown import Shutdown
from zcore.errors import StorageError
from zcore.image_files.writing import Marks
from zcore.jobs import claims, lifecycle, queries, recovery, workers
from zcore.jobs.database import Database
from zcore.jobs.models import Job, Leftover, LeftoverObject
from zcore.request import GenerationDefaults, RequestLimits, parse_submission
from zcore.settings import JobsSettings, WebhooksSettings, WorkerSettings
from zcore.stages import Stage
from zcore.storage import DirectoryStorage
from zcore.storage_keys import PROBE_KEY

DAY_S = 86_400.0
LEASE_S = 30.0


class UnreliableStorage(DirectoryStorage):
    """A storage folder that refuses everything while `is_down`, and the keys that `refuses` selects.

    Calls `after_put` with the key of each stored object.
    """

    is_down = False
    refuses: Callable[[str], bool] = staticmethod(lambda _key: False)
    after_put: Callable[[str], None] = staticmethod(lambda _key: None)
    root: Path

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.refused: list[str] = []

    def put(self, key: str, content: bytes, content_type: str) -> None:
        """Store an object. Raises `StorageError` if it is refused."""
        self._check(key)
        super().put(key, content, content_type)
        if key != PROBE_KEY:
            self.after_put(key)

    def get(self, key: str) -> bytes:
        """Return an object. Raises `StorageError` if it is refused."""
        self._check(key)
        return super().get(key)

    def _check(self, key: str) -> None:
        if self.is_down or self.refuses(key):
            self.refused.append(key)
            raise StorageError(f"{key}: the storage is down")

    def keys(self) -> list[str]:
        """Return the key of every stored object, sorted."""
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file())


@dataclass
class Environment:
    """Everything that a worker works with, in this process."""

    database: Database
    storage: UnreliableStorage
    pipeline: StandInPipeline = field(default_factory=StandInPipeline)
    prompt_encoder: StandInEncoder = field(default_factory=StandInEncoder)
    notifications: Notifications = field(default_factory=Notifications)
    ended: threading.Event = field(default_factory=threading.Event)
    broken: threading.Event = field(default_factory=threading.Event)
    hung: list[str] = field(default_factory=list)
    storage_returned: threading.Event = field(default_factory=threading.Event)
    outbound: WebhooksSettings = field(default_factory=lambda: WebhooksSettings(allow_private_addresses=True))

    def image_worker(
        self,
        grace_s: float = 60,
        name: str = "worker-1",
        pipeline: StandInPipeline | None = None,
        loras: LoraCache | None = None,
        marks: Marks | None = None,
        **changed: Any,
    ) -> tuple[ImageWorker, Shutdown]:
        """Return a worker that generates images, and its shutdown flag."""
        context = self.context(name, grace_s, **changed)
        inputs = InputSource(self.database, context.storage, self.outbound, RequestLimits(), loras)
        worker = ImageWorker(pipeline or self.pipeline, read_embedding, inputs, context, marks or Marks())
        return worker, context.shutdown

    def prompt_worker(
        self, grace_s: float = 60, name: str = "encoder-1", encoder: StandInEncoder | None = None, **changed: Any
    ) -> tuple[PromptWorker, Shutdown]:
        """Return a worker that only encodes prompts, and its shutdown flag."""
        context = self.context(name, grace_s, stages=(Stage.ENCODE,), **changed)
        return PromptWorker(encoder or self.prompt_encoder, write_embedding, context), context.shutdown

    def context(self, name: str, grace_s: float, **changed: Any) -> WorkerContext:
        """Return the context of a worker."""
        values = {"lease_s": 30.0, "retry_delay_s": 0.0, "upload_retry_s": 30.0, "progress_interval_s": 0.02, **changed}
        of_jobs = {name: values.pop(name) for name in set(values) & set(JobsSettings.__struct_fields__)}
        settings = WorkerSettings(**values)
        return WorkerContext(
            self.database,
            PatientStorage(self.storage, settings.upload_retry_s, self.storage_returned.set),
            JobsSettings(retention_s=600, **of_jobs),
            settings,
            name=name,
            shutdown=Shutdown(grace_s),
            notify=self.notifications.notify,
            on_ended=self.ended.set,
            on_broken=self.broken.set,
            on_hung=self._note_hung,
        )

    def _note_hung(self, reason: str) -> None:
        self.hung.append(reason)

    def maintenance(self, shutdown: Shutdown, clock: Callable[[], float] = time.monotonic) -> Maintenance:
        """Return the maintenance of this environment."""
        return Maintenance(
            self.database,
            self.storage,
            self.notifications.notify_again,
            self.ended.set,
            0.02,
            shutdown,
            DAY_S,
            JobsSettings().history_s,
            LEASE_S,
            clock,
        )

    def generate_due(self, **changed: Any) -> int:
        """Generate and store the images of every due job. Return the number of claimed jobs."""
        worker, _ = self.image_worker(**changed)
        claimed = worker.drain()
        worker.finish()
        return claimed

    def encode_due(self, **changed: Any) -> int:
        """Encode and store the prompt of every due job. Return the number of claimed jobs."""
        worker, _ = self.prompt_worker(**changed)
        return worker.drain()

    def submit(self, max_attempts: int = 3, stage: Stage = Stage.GENERATE, **fields: Any) -> UUID:
        """Submit a job, and return its id."""
        body = {"prompt": "a fox", "width": 64, "height": 64, "steps": 4, **fields}
        submission = parse_submission(body, GenerationDefaults(), RequestLimits())
        with self.database.write() as transaction:
            return lifecycle.submit(transaction, submission, "anna", "0" * 64, max_attempts, stage=stage).job.id

    def report_present(self, *names: str, stages: Collection[Stage] = tuple(Stage)) -> None:
        """Report workers as present."""
        with self.database.write() as transaction:
            for name in names:
                workers.report(transaction, name, "a model", "cpu", stages)

    def job(self, job_id: UUID) -> Job:
        """Return the current row of a job."""
        with self.database.read() as transaction:
            return queries.get(transaction, job_id)

    def events(self, job_id: UUID) -> list[str]:
        """Return the types of a job's events, oldest first."""
        with self.database.read() as transaction:
            return [event.type for event in queries.timeline(transaction, job_id).events]

    def cancel(self, job_id: UUID) -> None:
        """Request cancellation of a job."""
        with self.database.write() as transaction:
            lifecycle.cancel(transaction, job_id)

    def delete_leftovers(self) -> None:
        """Delete the objects that belong to no row, as if every delay were over."""
        with self.database.write() as transaction:
            for table in (Leftover, LeftoverObject):
                transaction.session.execute(update(table).values(due_at=transaction.now))
        tasks.delete_leftovers(self.database, self.storage, lambda: True)

    def patient_storage(self) -> PatientStorage:
        """Return the storage as a worker uses it."""
        return PatientStorage(self.storage, patience_s=30, on_return=self.storage_returned.set)

    def lose_worker(self, job_id: UUID) -> None:
        """Let a worker claim the job and be lost, and maintenance rescue it."""
        with self.database.write() as transaction:
            claimed = claims.claim(transaction, "worker-2", -1)
            assert claimed is not None
            assert claimed.id == job_id
        with self.database.write() as transaction:
            recovery.rescue(transaction)

    def lose_lease(self, job_id: UUID) -> None:
        """Let the lease expire, and let another worker claim the job."""
        with self.database.write() as transaction:
            entry = queries.get(transaction, job_id).entry
            assert entry is not None
            entry.lease_until = transaction.now.replace(year=2000)
            transaction.session.flush()
            recovery.rescue(transaction)
            claimed = claims.claim(transaction, "worker-2", 600)
        assert claimed is not None
        assert claimed.id == job_id


@pytest.fixture
def environment(each_database_url: str, tmp_path: Path) -> Iterator[Environment]:
    """An environment on SQLite and on PostgreSQL."""
    storage = open_storage(tmp_path)
    storage.prepare()
    with closing(Database(each_database_url)) as database:
        yield Environment(database, storage)


@pytest.fixture
def maintenance(environment: Environment) -> Maintenance:
    """Maintenance whose tasks the test runs."""
    return environment.maintenance(Shutdown(0))


def open_storage(folder: Path) -> UnreliableStorage:
    """Return a storage below `folder`."""
    storage = UnreliableStorage(folder / "storage", "http://127.0.0.1:8000", "key", link_expiry_s=60)
    storage.root = folder / "storage"
    return storage
