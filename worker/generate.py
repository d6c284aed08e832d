"""One job after another, as long as any is due: claim, paint, store, complete.

Takes a loaded pipeline, the database and the storage; `drain` is what a ring of the doorbell runs. While the next
picture is painted, the last one is encoded, uploaded and completed by other threads. Every way a job can end is here.
Does not know Celery.
"""

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from worker import pictures
from worker.pulse import Pulse
from worker.shutdown import Shutdown
from zcore.errors import (
    GenerationCanceled,
    GenerationHandedBack,
    LeaseLost,
    StorageError,
    ZImageError,
)
from zcore.imaging.encode import encode_image
from zcore.jobs import lifecycle
from zcore.jobs.database import Database
from zcore.jobs.lifecycle import Failure, Lease, StoredOutput
from zcore.jobs.models import Job
from zcore.request import GenerationRequest
from zcore.settings import JobsSettings, WorkerSettings
from zcore.storage import Storage
from zcore.telemetry import bound, log

if TYPE_CHECKING:
    from zcore.imaging.pipeline import GenerationResult, ZImagePipeline

CRASHES_AT_MOST = 3
UPLOAD_BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


@dataclass(frozen=True)
class _Painted:
    """A job whose pixels are there and whose lease is still held."""

    job: Job
    lease: Lease
    pulse: Pulse
    request: GenerationRequest
    result: "GenerationResult"


class Generator:
    """The GPU's work in this process. `drain` is called by one thread at a time; `finish` once, at the end."""

    def __init__(
        self,
        pipeline: "ZImagePipeline",
        database: Database,
        storage: Storage,
        jobs: JobsSettings,
        settings: WorkerSettings,
        name: str,
        shutdown: Shutdown,
        on_ended: Callable[[], None],
        on_broken: Callable[[], None],
    ) -> None:
        """`on_ended` is called after each job that reached its end, so that its webhook need not wait for the clock;
        `on_broken` when this process can no longer paint and has to end.
        """
        self._pipeline = pipeline
        self._database = database
        self._storage = storage
        self._jobs = jobs
        self._settings = settings
        self._name = name
        self._shutdown = shutdown
        self._on_ended = on_ended
        self._on_broken = on_broken
        self._crashes = 0
        self._uploads = ThreadPoolExecutor(max_workers=settings.upload_backlog, thread_name_prefix="upload")
        # Painting waits when this many painted jobs are not stored yet, so that a slow bucket cannot fill the memory.
        self._backlog = threading.BoundedSemaphore(settings.upload_backlog)

    def drain(self) -> int:
        """Works until nothing is due or the worker is leaving. Gives the number of jobs it took."""
        taken = 0
        while not self._shutdown.is_begun:
            try:
                with self._database.write() as transaction:
                    job = lifecycle.claim(transaction, self._name, self._jobs.lease_s)
            except SQLAlchemyError as fault:
                # The clock rings again for what is still due when the database is back.
                log.warning("job.not_claimed", error=type(fault).__name__)
                break
            if job is None:
                break
            taken += 1
            with bound(job_id=str(job.id), attempt=job.attempt):
                self._paint(job)
        return taken

    @property
    def is_broken(self) -> bool:
        """Whether so many jobs crashed in a row that this process, not they, must be at fault."""
        return self._crashes >= CRASHES_AT_MOST

    def finish(self) -> None:
        """Waits until everything painted is stored and completed."""
        self._uploads.shutdown(wait=True)

    def _paint(self, job: Job) -> None:
        log.info("job.claimed", priority=job.priority)
        lease = lifecycle.lease_of(job)
        pulse = Pulse(self._database, lease, self._jobs.lease_s, self._settings.progress_interval_s, self._shutdown)
        pulse.start()
        try:
            request = msgspec.convert(job.request, GenerationRequest)
            result = self._pipeline.generate(request, pulse.on_step)
        except Exception as fault:
            pulse.stop()
            self._end_unpainted(lease, fault)
            self._count_crash(fault)
            return
        self._crashes = 0
        self._backlog.acquire()
        self._uploads.submit(self._store, _Painted(job, lease, pulse, request, result))

    def _count_crash(self, fault: Exception) -> None:
        """A GPU that failed once fails every later call of its process: such a worker leaves before it spoils the
        queue.
        """
        if isinstance(fault, ZImageError):
            return
        poisoned = type(fault).__name__ == "AcceleratorError" or "CUDA error" in str(fault)
        self._crashes = CRASHES_AT_MOST if poisoned else self._crashes + 1
        if self.is_broken:
            log.error("worker.broken", crashes=self._crashes, cause=type(fault).__name__)
            self._shutdown.begin()
            self._on_broken()

    def _store(self, painted: _Painted) -> None:
        """Runs beside the next job's painting; the lease is held until the very end."""
        with bound(job_id=str(painted.job.id), attempt=painted.job.attempt):
            try:
                self._complete(painted)
            except Exception as fault:
                if self._end_unpainted(painted.lease, fault):
                    self._delete(painted, [painted.job.attempt])
            finally:
                painted.pulse.stop()
                self._backlog.release()

    def _complete(self, painted: _Painted) -> None:
        began = time.monotonic()
        give_up_at = began + self._settings.upload_retry_s
        outputs = [self._put(painted, index, give_up_at) for index in range(len(painted.result.images))]
        metrics = _metrics(painted, upload_ms=_milliseconds(time.monotonic() - began))
        with self._database.write() as transaction:
            job = lifecycle.complete(
                transaction,
                painted.lease,
                outputs,
                metrics,
                self._pipeline.describe(painted.request),
                self._jobs.retention_s,
            )
        if job is None:
            raise LeaseLost("another worker has this job by now")
        log.info("job.succeeded", **metrics)
        self._on_ended()
        # Pictures that earlier attempts stored before their worker was lost. Their keys are known, not listed.
        self._delete(painted, range(1, job.attempt))

    def _put(self, painted: _Painted, index: int, give_up_at: float) -> StoredOutput:
        """Encodes and stores one picture; tries again until `give_up_at`, while nothing calls the job off."""
        painted.pulse.check()
        image = painted.result.images[index]
        encoded = encode_image(image.image, painted.request, image.index, self._pipeline.describe(painted.request))
        key = pictures.key_of(painted.job.id, painted.job.attempt, index, encoded.format)
        for attempt in count():
            try:
                self._storage.put(key, encoded.content, encoded.media_type)
                break
            except StorageError as fault:
                painted.pulse.check()
                if time.monotonic() >= give_up_at:
                    raise
                log.warning("upload.failed", key=key, error=fault.message)
                pause_s = UPLOAD_BACKOFF_S[min(attempt, len(UPLOAD_BACKOFF_S) - 1)]
                if self._shutdown.wait(pause_s):
                    time.sleep(UPLOAD_BACKOFF_S[0])
        return StoredOutput(
            position=index,
            key=key,
            format=encoded.format,
            width=encoded.width,
            height=encoded.height,
            bytes=len(encoded.content),
            sha256=encoded.sha256,
            seed=image.seed,
        )

    def _delete(self, painted: _Painted, attempts: Iterable[int]) -> None:
        """As well as it goes: what stays behind costs space, not a job."""
        try:
            self._storage.delete(pictures.keys_of(painted.job.id, attempts, painted.request.n, painted.request.format))
        except StorageError as fault:
            log.warning("leftovers.stay", error=fault.message)

    def _end_unpainted(self, lease: Lease, fault: Exception) -> bool:
        """Every end but success; whether it is certain that this attempt did not succeed.

        What the database does not take now, the lease's end puts right.
        """
        if isinstance(fault, LeaseLost):
            log.warning("job.lease_lost")
            return True
        try:
            with self._database.write() as transaction:
                if isinstance(fault, GenerationCanceled):
                    ended = lifecycle.acknowledge_cancel(transaction, lease)
                elif isinstance(fault, GenerationHandedBack):
                    ended = lifecycle.hand_back(transaction, lease)
                else:
                    ended = lifecycle.fail(transaction, lease, _failure(fault), self._jobs.retry_delay_s)
        except SQLAlchemyError as unwritten:
            log.error("job.end_not_written", error=type(unwritten).__name__, cause=type(fault).__name__)
            return False
        log.info("job.ended", status=ended.status if ended else "lease lost", cause=type(fault).__name__)
        self._on_ended()
        return ended is not None


def _failure(fault: Exception) -> Failure:
    if isinstance(fault, ZImageError):
        return Failure(fault.code, fault.message, fault.retryable)
    log.error("job.crashed", exc_info=fault)
    return Failure("internal_error", f"the worker failed unexpectedly ({type(fault).__name__})", retryable=True)


def _metrics(painted: _Painted, upload_ms: int) -> dict[str, Any]:
    job = painted.job
    assert job.started_at is not None, "a claimed job has started"
    queue_ms = _milliseconds((job.started_at - job.available_at).total_seconds())
    measured = {name: round(value) for name, value in asdict(painted.result.metrics).items()}
    spent_ms = measured["encode_ms"] + measured["denoise_ms"] + measured["decode_ms"]
    return {"queue_ms": queue_ms, **measured, "upload_ms": upload_ms, "total_ms": queue_ms + spent_ms + upload_ms}


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
