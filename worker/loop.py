"""The job loop: claims due jobs one after another, and records every end of an attempt except success.

The subclasses `ImageWorker` and `PromptWorker` process the claimed job. Does not depend on Celery, models or torch.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from uuid import UUID

import msgspec

from worker.abandonable import call_within
from worker.context import WorkerContext
from worker.heartbeat import Heartbeat
from worker.phases import PhaseBudgets, StallWatch, shape_of
from worker.recording import record
from zcore.errors import (
    EmbeddingLost,
    GenerationCanceled,
    GenerationReleased,
    LeaseLost,
    StorageError,
    ZImageError,
)
from zcore.foreign_text import excerpt
from zcore.jobs import claims, lifecycle, states
from zcore.jobs.claims import Lease
from zcore.jobs.database import DatabaseError, Transaction
from zcore.jobs.lifecycle import Failure
from zcore.jobs.models import Job
from zcore.jobs.states import State
from zcore.jobs.workers import CacheCounts
from zcore.request import GenerationRequest
from zcore.stages import Stage
from zcore.telemetry import bound, log

MAX_CONSECUTIVE_CRASHES = 3
"""Number of different jobs whose crashes in a row mean that this process is broken."""
LONGEST_MESSAGE = 4000
"""Largest number of characters of a job's error, which webhooks repeat."""
SETTLE_INTERVAL_S = 0.05
WRITE_TIMEOUT_S = 5.0
"""How long a heartbeat may take to record the end of an attempt whose thread does not react."""
ENDS = frozenset(
    one.event for one in (states.CANCEL_RUNNING, states.RELEASE, states.REENCODE, states.SCHEDULE_RETRY, states.FAIL)
)
"""Events of attempts that end without success."""


class JobLoop(ABC):
    """Processes the jobs of this worker. One thread at a time calls `drain`; `finish` is called once, at the end."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._crashed: set[UUID] = set()
        self._gpu_failed = False
        self._heartbeats: list[Heartbeat] = []
        settings = context.settings
        self._budgets = PhaseBudgets(settings.stall_floor_s, context.jobs.lease_s, settings.stall_factor)

    def drain(self) -> int:
        """Process jobs until none is due, shutdown begins or storage is away. Return the number of claimed jobs."""
        context = self._context
        claimed = 0
        while not (context.shutdown.is_begun or context.storage.is_away):
            try:
                with context.database.write() as transaction:
                    job = claims.claim(transaction, context.name, context.jobs.lease_s, context.settings.stages)
            except DatabaseError as fault:
                # Once the database is back, maintenance notifies workers again of jobs that are still due.
                log.warning("job.claim_failed", error=type(fault).__name__)
                break
            if job is None:
                break
            claimed += 1
            with bound(job_id=str(job.id), attempt=job.attempt):
                self._attempt(job)
        return claimed

    @property
    def is_broken(self) -> bool:
        """Whether so many different jobs crashed in a row that the cause must be this process, not the jobs."""
        return self._gpu_failed or len(self._crashed) >= MAX_CONSECUTIVE_CRASHES

    @property
    def attempts_in_progress(self) -> int:
        """Number of jobs whose lease this process holds."""
        return sum(one.is_running for one in self._heartbeats)

    @abstractmethod
    def cache_counts(self) -> CacheCounts:
        """Return how often the embedding cache of this worker helped."""

    @abstractmethod
    def finish(self) -> None:
        """Wait for all work that continues after `drain` has returned."""

    @abstractmethod
    def _work(self, job: Job, request: GenerationRequest, heartbeat: Heartbeat) -> None:
        """Process the job, or pass it to a thread that finishes it and stops the heartbeat.

        An exception ends the attempt.
        """

    def _attempt(self, job: Job) -> None:
        context = self._context
        log.info("job.claimed", priority=job.priority, stage=job.stage)
        watch = StallWatch(self._budgets, context.jobs.attempt_deadline_s)
        heartbeat = Heartbeat(context, job, watch, self._end_unresponsive)
        self._heartbeats = [*(one for one in self._heartbeats if one.is_running), heartbeat]
        heartbeat.start()
        try:
            if job.isolated:
                self._wait_for_attempts(1, heartbeat.check)
            request = msgspec.convert(job.request, GenerationRequest)
            watch.expect(shape_of(request))
            self._work(job, request, heartbeat)
        except Exception as fault:
            heartbeat.stop()
            self._end_attempt(heartbeat, fault)
            self._count_crash(job, fault)
        else:
            self._crashed.clear()
        if job.isolated:
            self._wait_for_attempts(0)

    def _wait_for_attempts(self, count: int, check: Callable[[], None] = lambda: None) -> None:
        """Wait until at most `count` attempts are in progress. Raises what `check` raises meanwhile.

        A job that may have killed a worker runs alone, so that it cannot take others with it.
        """
        while self.attempts_in_progress > count:
            check()
            time.sleep(SETTLE_INTERVAL_S)

    def _count_crash(self, job: Job, fault: Exception) -> None:
        """Stop this worker after crashes of too many different jobs; the retries of one job count once.

        A job that runs alone is suspected already, and says nothing about the process. After one GPU failure every
        later GPU call of the process fails, so one failure is enough.
        """
        if isinstance(fault, ZImageError | DatabaseError):
            return
        if not job.isolated:
            self._crashed.add(job.id)
        is_cuda_error = isinstance(fault, RuntimeError) and "CUDA error" in str(fault)
        self._gpu_failed = type(fault).__name__ == "AcceleratorError" or is_cuda_error
        if self.is_broken:
            log.error("worker.failed", crashed_jobs=len(self._crashed), cause=type(fault).__name__)
            self._context.shutdown.begin()
            self._context.on_broken()

    def _record(
        self, heartbeat: Heartbeat, transition: states.Transition, write: Callable[[Transaction], Job | None]
    ) -> Job:
        """Return the job after `write` has recorded `transition`. Raises `LeaseLost` and `DatabaseError`."""
        job = record(self._context.database, heartbeat, {transition.event}, write)
        if job is None:
            raise LeaseLost("the lease of this job was lost")
        return job

    def _end_unresponsive(self, heartbeat: Heartbeat, fault: ZImageError) -> None:
        """End the attempt of a thread that does not react, in limited time."""
        with bound(job_id=str(heartbeat.lease.job_id), attempt=heartbeat.attempt):
            log.warning("job.unresponsive", reason=fault.message)
            try:
                call_within(partial(self._end_attempt, heartbeat, fault), WRITE_TIMEOUT_S, "end-attempt")
            except TimeoutError as timeout:
                log.error("job.end_write_failed", error=str(timeout), cause=type(fault).__name__)

    def _end_attempt(self, heartbeat: Heartbeat, fault: Exception) -> None:
        """Record the end of an unsuccessful attempt.

        If the database is not available, the job is rescued when its lease expires.
        """
        if isinstance(fault, LeaseLost):
            log.warning("job.lease_lost")
            return
        try:
            job = record(
                self._context.database, heartbeat, ENDS, partial(self._write_end, lease=heartbeat.lease, fault=fault)
            )
        except DatabaseError as database_fault:
            log.error("job.end_write_failed", error=type(database_fault).__name__, cause=type(fault).__name__)
            return
        log.info("job.attempt_ended", status=job.status if job else "lease_lost", cause=type(fault).__name__)
        self._context.on_ended()
        if job is not None and job.status == State.QUEUED and job.stage == Stage.ENCODE:
            self._context.notify(Stage.ENCODE)

    def _write_end(self, transaction: Transaction, lease: Lease, fault: Exception) -> Job | None:
        """Return the job after the attempt, or None if the lease is lost."""
        if isinstance(fault, GenerationCanceled):
            return lifecycle.acknowledge_cancel(transaction, lease)
        if isinstance(fault, GenerationReleased):
            return lifecycle.release(transaction, lease)
        if isinstance(fault, EmbeddingLost):
            return lifecycle.reencode(transaction, lease, _failure(fault))
        return lifecycle.fail(transaction, lease, _failure(fault), self._context.jobs.retry_delay_s)


def waited_ms(job: Job) -> int:
    """Return how long a claimed job waited after it was due, in milliseconds."""
    assert job.started_at is not None, "a claimed job has started"
    assert job.available_at is not None, "a claimed job was due"
    return milliseconds((job.started_at - job.available_at).total_seconds())


def milliseconds(seconds: float) -> int:
    """Convert seconds to whole milliseconds, the unit of metrics."""
    return round(seconds * 1000)


def _failure(fault: Exception) -> Failure:
    """Describe the end of an attempt. It is not charged if a service was away, which is not the job's fault."""
    if isinstance(fault, ZImageError):
        message = excerpt(fault.message, LONGEST_MESSAGE)
        return Failure(fault.code, message, fault.retryable, charged=not isinstance(fault, StorageError))
    if isinstance(fault, DatabaseError):
        log.error("job.database_failed", error=type(fault).__name__)
        return Failure("database_unavailable", "the database did not answer the worker", retryable=True, charged=False)
    log.error("job.crashed", exc_info=fault)
    message = f"the worker failed unexpectedly ({type(fault).__name__}); its log has the details"
    return Failure("internal_error", message, retryable=True)
