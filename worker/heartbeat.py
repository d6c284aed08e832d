"""Heartbeat of one running job: renews its lease while the work advances, and ends the attempt if it does not.

A thread of its own renews the lease, writes progress and timeline events, reads cancellation requests, and notices when
a phase takes too long. The thread that works enters phases and calls `check`, neither of which waits for the database.
It normally ends the attempt itself, when `check` raises; if it does not come back to `check`, the heartbeat does.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from worker.context import WorkerContext
from worker.periodic import PeriodicTask
from worker.phases import Phase, StallWatch
from zcore.errors import AttemptStalled, GenerationCanceled, GenerationReleased, LeaseLost, ZImageError
from zcore.jobs import claims
from zcore.jobs.database import DatabaseError
from zcore.jobs.models import Job
from zcore.telemetry import log

if TYPE_CHECKING:
    from zcore.imaging.oom_fallback import FallbackStep
    from zcore.imaging.pipeline import Progress

RENEWALS_PER_LEASE = 3
READ_INTERVAL_S = 0.25
"""Smallest interval between two reads of cancellation requests, while steps are made."""
IDLE_READ_INTERVAL_S = 1.0
"""The same while no step is made."""
UNRESPONSIVE_S = 2.0
"""How long the working thread may take to end an attempt that must stop."""

EndAttempt = Callable[["Heartbeat", ZImageError], object]


class Heartbeat:
    """Keeps one attempt alive from `start` to `stop`, while its work advances.

    The lease is lost permanently if the database refuses a renewal, and counts as lost while the database has not
    answered for longer than the lease.
    """

    def __init__(self, context: WorkerContext, job: Job, watch: StallWatch, end_attempt: EndAttempt) -> None:
        """`job` was just claimed. `end_attempt` records the end of an attempt whose thread does not react."""
        self.lease = claims.lease_of(job)
        self.attempt = job.attempt
        self._context = context
        self._watch = watch
        self._end_attempt = end_attempt
        self._progress: Progress | None = None
        self._written_progress: Progress | None = None
        self._pending_events: deque[tuple[str, dict[str, Any]]] = deque()
        self._writing_events = threading.Lock()
        self._canceled = False
        self._stalled: str | None = None
        self._lost = False
        self._stopping = False
        self._ended = False
        self._must_stop_since: float | None = None
        now = time.monotonic()
        self._looked_at = self._read_at = self._wrote_at = self._renewed_at = now
        self._renew_at = now + context.jobs.lease_s / RENEWALS_PER_LEASE
        # Not stopped by shutdown: the current job keeps its lease during the grace period.
        interval_s = min(READ_INTERVAL_S, context.jobs.lease_s / RENEWALS_PER_LEASE / 2)
        self._task = PeriodicTask("heartbeat", self._run, interval_s)

    def start(self) -> None:
        """Start renewing the lease."""
        self._task.start()

    def enter(self, phase: Phase) -> None:
        """Begin a phase. Raises as `check` does."""
        self._watch.enter(phase)
        self.check()

    def on_step(self, progress: "Progress") -> None:
        """Begin a step of the generation, and store the progress for the next write. Raises as `check` does."""
        self._progress = progress
        self.enter(Phase(progress.phase))

    def on_fallback(self, step: "FallbackStep") -> None:
        """Store a fallback step for the job's timeline."""
        log.warning(f"{step.event}.applied", step=step.kind, detail=step.description)
        self._watch.expect(None)  # from now on it computes in another way
        self._pending_events.append((step.event, {"step": step.kind, "detail": step.description}))

    def check(self) -> None:
        """Raise `LeaseLost`, `GenerationCanceled`, `GenerationReleased` or `AttemptStalled` if the job must stop."""
        reason = self._reason_to_stop()
        if reason is not None:
            raise reason

    @property
    def is_running(self) -> bool:
        """Whether `stop` has not been called yet."""
        return not self._stopping

    @property
    def holds_lease(self) -> bool:
        """Whether the lease is still valid, as far as this process can know."""
        return not self._lost and time.monotonic() - self._renewed_at <= self._context.jobs.lease_s

    def write_events(self) -> None:
        """Write the pending timeline events. Events that cannot be written now stay pending."""
        with self._writing_events:
            try:
                while self._pending_events:
                    with self._context.database.write() as transaction:
                        claims.add_event(transaction, self.lease, *self._pending_events[0])
                    self._pending_events.popleft()
            except DatabaseError as fault:
                log.warning("job.event_write_failed", job_id=str(self.lease.job_id), error=type(fault).__name__)

    def stop(self) -> None:
        """Stop renewing the lease and write the pending events. The lease stays valid until it expires."""
        self._stopping = True
        self._task.stop()
        self.write_events()

    def _reason_to_stop(self) -> ZImageError | None:
        if self._ended or not self.holds_lease:
            return LeaseLost("the lease of this job was lost")
        if self._canceled:
            return GenerationCanceled("the caller canceled the job")
        if self._context.shutdown.is_overdue:
            return GenerationReleased("this worker is shutting down")
        return AttemptStalled(self._stalled) if self._stalled else None

    def _run(self) -> None:
        self._watch_for_stalls()
        if not (self._ended or self._lost):
            self._talk_to_database()
            self.write_events()
        self._end_if_unresponsive()

    def _watch_for_stalls(self) -> None:
        now = time.monotonic()
        if self._context.storage.is_away and self._watch.needs_storage:
            self._watch.excuse(now - self._looked_at)
        self._looked_at = now
        self._stalled = self._stalled or self._watch.stalled()

    def _talk_to_database(self) -> None:
        """Renew the lease with the progress, or read the cancellation request, or do neither: what is due."""
        now = time.monotonic()
        has_stepped = self._progress is not self._written_progress
        if now >= self._renew_at or (
            has_stepped and now - self._wrote_at >= self._context.settings.progress_interval_s
        ):
            self._renew(now)
        elif now - self._read_at >= (READ_INTERVAL_S if has_stepped else IDLE_READ_INTERVAL_S):
            self._read_cancellation(now)

    def _renew(self, now: float) -> None:
        progress, lease_s = self._progress, self._context.jobs.lease_s
        values = (progress.phase, progress.step, progress.steps) if progress is not None else None
        self._wrote_at = self._read_at = now
        try:
            with self._context.database.write() as transaction:
                renewal = claims.heartbeat(transaction, self.lease, lease_s, values)
        except DatabaseError as fault:
            log.warning("job.heartbeat_failed", job_id=str(self.lease.job_id), error=type(fault).__name__)
            self._renew_at = now + min(1.0, lease_s / RENEWALS_PER_LEASE / 2)
            return
        if renewal is None:
            self._lost = True
            return
        self._written_progress = progress
        self._renewed_at = now  # before the write, so that the lease never ends later here than in the database
        self._renew_at = now + lease_s / RENEWALS_PER_LEASE
        self._canceled = renewal.cancel_requested

    def _read_cancellation(self, now: float) -> None:
        self._read_at = now
        try:
            with self._context.database.read() as transaction:
                requested = claims.cancellation_requested(transaction, self.lease)
        except DatabaseError as fault:
            log.debug("job.cancellation_read_failed", job_id=str(self.lease.job_id), error=type(fault).__name__)
            return
        self._lost = requested is None
        self._canceled = bool(requested)

    def _end_if_unresponsive(self) -> None:
        """End an attempt that must stop and does not. A stalled one also takes its process with it.

        The thread of a canceled job may only be in a long step; the process goes on, and the step stays within its
        budget or stalls.
        """
        reason, now = self._reason_to_stop(), time.monotonic()
        if reason is None:
            self._must_stop_since = None  # the database answered again in time
        if reason is None or self._stopping:
            return
        self._must_stop_since = self._must_stop_since or now
        if now - self._must_stop_since < UNRESPONSIVE_S:
            return
        if not (self._ended or isinstance(reason, LeaseLost)):
            self._ended = True
            self._end_attempt(self, reason)
        if self._stalled and not self._stopping:
            self._context.on_hung(self._stalled)
