"""One job after another, as long as any is due: claim, work, and every way an attempt can end but success.

Gives `JobLoop`, whose `drain` is what a ring of the doorbell runs, and `Workplace`, all that such a loop works with.
What is done with a claimed job is its subclasses': `encode` and `generate`. Does not know Celery, models or torch.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count

from sqlalchemy.exc import SQLAlchemyError

from worker.pulse import Pulse
from worker.shutdown import Shutdown
from zcore.errors import (
    EmbeddingLost,
    GenerationCanceled,
    GenerationHandedBack,
    LeaseLost,
    StorageError,
    ZImageError,
)
from zcore.jobs import lifecycle
from zcore.jobs.database import Database
from zcore.jobs.lifecycle import Failure, Lease
from zcore.jobs.models import Job
from zcore.jobs.states import State
from zcore.settings import JobsSettings, WorkerSettings
from zcore.stages import Stage
from zcore.storage import Storage
from zcore.telemetry import bound, log

CRASHES_AT_MOST = 3
UPLOAD_BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


@dataclass(frozen=True)
class Workplace:
    """What every worker works with, under its `name`.

    `announce` rings for a stage. `on_ended` is called after each job that reached its end, so that its webhook need not
    wait for the clock; `on_broken` when this process can no longer work and has to end.
    """

    database: Database
    storage: Storage
    jobs: JobsSettings
    settings: WorkerSettings
    name: str
    shutdown: Shutdown
    announce: Callable[[Stage], None]
    on_ended: Callable[[], None]
    on_broken: Callable[[], None]


class JobLoop(ABC):
    """A worker's work in this process. `drain` is called by one thread at a time; `finish` once, at the end."""

    def __init__(self, workplace: Workplace) -> None:
        self._place = workplace
        self._crashes = 0

    def drain(self) -> int:
        """Works until nothing is due or the worker is leaving. Gives the number of jobs it took."""
        place = self._place
        taken = 0
        while not place.shutdown.is_begun:
            try:
                with place.database.write() as transaction:
                    job = lifecycle.claim(transaction, place.name, place.jobs.lease_s, place.settings.stages)
            except SQLAlchemyError as fault:
                # The clock rings again for what is still due when the database is back.
                log.warning("job.not_claimed", error=type(fault).__name__)
                break
            if job is None:
                break
            taken += 1
            with bound(job_id=str(job.id), attempt=job.attempt):
                self._attempt(job)
        return taken

    @property
    def is_broken(self) -> bool:
        """Whether so many jobs crashed in a row that this process, not they, must be at fault."""
        return self._crashes >= CRASHES_AT_MOST

    @abstractmethod
    def finish(self) -> None:
        """Waits for everything that is still under way beside `drain`."""

    @abstractmethod
    def _work(self, job: Job, lease: Lease, pulse: Pulse) -> None:
        """Does the job, or hands it to a thread that does the rest and stops the pulse. What it raises ends the
        attempt.
        """

    def _attempt(self, job: Job) -> None:
        place = self._place
        log.info("job.claimed", priority=job.priority, stage=job.stage)
        lease = lifecycle.lease_of(job)
        pulse = Pulse(place.database, lease, place.jobs.lease_s, place.settings.progress_interval_s, place.shutdown)
        pulse.start()
        try:
            self._work(job, lease, pulse)
        except Exception as fault:
            pulse.stop()
            self._end(lease, fault)
            self._count_crash(fault)
        else:
            self._crashes = 0

    def _count_crash(self, fault: Exception) -> None:
        """A GPU that failed once fails every later call of its process: such a worker leaves before it spoils the
        queue.
        """
        if isinstance(fault, ZImageError | SQLAlchemyError):
            return
        poisoned = type(fault).__name__ == "AcceleratorError" or "CUDA error" in str(fault)
        self._crashes = CRASHES_AT_MOST if poisoned else self._crashes + 1
        if self.is_broken:
            log.error("worker.broken", crashes=self._crashes, cause=type(fault).__name__)
            self._place.shutdown.begin()
            self._place.on_broken()

    def _end(self, lease: Lease, fault: Exception) -> bool:
        """Every end but success; whether it is certain that this attempt did not succeed.

        What the database does not take now, the lease's end puts right.
        """
        if isinstance(fault, LeaseLost):
            log.warning("job.lease_lost")
            return True
        try:
            ended = self._written(lease, fault)
        except SQLAlchemyError as unwritten:
            log.error("job.end_not_written", error=type(unwritten).__name__, cause=type(fault).__name__)
            return False
        log.info("job.ended", status=ended.status if ended else "lease lost", cause=type(fault).__name__)
        self._place.on_ended()
        if ended is not None and ended.status == State.QUEUED and ended.stage == Stage.ENCODE:
            self._place.announce(Stage.ENCODE)
        return ended is not None

    def _written(self, lease: Lease, fault: Exception) -> Job | None:
        """The job after this end of its attempt; None when the lease was lost."""
        with self._place.database.write() as transaction:
            if isinstance(fault, GenerationCanceled):
                return lifecycle.acknowledge_cancel(transaction, lease)
            if isinstance(fault, GenerationHandedBack):
                return lifecycle.hand_back(transaction, lease)
            if isinstance(fault, EmbeddingLost):
                return lifecycle.reencode(transaction, lease, _failure(fault))
            return lifecycle.fail(transaction, lease, _failure(fault), self._place.jobs.retry_delay_s)

    def _put(self, key: str, content: bytes, content_type: str, pulse: Pulse, give_up_at: float) -> None:
        """Stores an object; tries again until `give_up_at` (monotonic), while nothing calls the job off."""
        for attempt in count():
            try:
                self._place.storage.put(key, content, content_type)
                return
            except StorageError as fault:
                pulse.check()
                if time.monotonic() >= give_up_at:
                    raise
                log.warning("upload.failed", key=key, error=fault.message)
                pause_s = UPLOAD_BACKOFF_S[min(attempt, len(UPLOAD_BACKOFF_S) - 1)]
                if self._place.shutdown.wait(pause_s):
                    time.sleep(UPLOAD_BACKOFF_S[0])

    def _delete(self, keys: Iterable[str]) -> None:
        """As well as it goes: what stays behind costs space, not a job."""
        try:
            self._place.storage.delete(keys)
        except StorageError as fault:
            log.warning("leftovers.stay", error=fault.message)


def waited_ms(job: Job) -> int:
    """How long a claimed job had waited since it was due."""
    assert job.started_at is not None, "a claimed job has started"
    return milliseconds((job.started_at - job.available_at).total_seconds())


def milliseconds(seconds: float) -> int:
    """Rounded to whole ones, as metrics are kept."""
    return round(seconds * 1000)


def _failure(fault: Exception) -> Failure:
    if isinstance(fault, ZImageError):
        return Failure(fault.code, fault.message, fault.retryable)
    log.error("job.crashed", exc_info=fault)
    return Failure("internal_error", f"the worker failed unexpectedly ({type(fault).__name__})", retryable=True)
