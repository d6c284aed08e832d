"""The life sign of one running job: a thread that renews its lease, writes progress and notes, and brings back the
wish to cancel.

Takes a lease; gives `on_step`, which the pipeline calls between steps and which raises the `Interruption` that is due,
and `on_relief`, which it calls when it gave something up. The pipeline's thread never waits for the database. Does not
end the job: `generate` does.
"""

import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError

from worker.shutdown import Shutdown
from zcore.errors import GenerationCanceled, GenerationHandedBack, LeaseLost
from zcore.jobs import lifecycle
from zcore.jobs.database import Database
from zcore.jobs.lifecycle import Lease
from zcore.telemetry import log

if TYPE_CHECKING:
    from zcore.imaging.pipeline import Progress
    from zcore.imaging.relief import Relief

BEATS_PER_LEASE = 3


class Pulse:
    """Beats from `start` to `stop`. Losing the lease, by refusal or by silence of the database, is final."""

    def __init__(self, database: Database, lease: Lease, lease_s: float, interval_s: float, shutdown: Shutdown) -> None:
        """`interval_s` is how often progress is written and the wish to cancel is read."""
        self._database = database
        self._lease = lease
        self._lease_s = lease_s
        self._interval_s = min(interval_s, lease_s / BEATS_PER_LEASE)
        self._shutdown = shutdown
        self._progress: Progress | None = None
        self._notes: deque[str] = deque()
        self._writing_notes = threading.Lock()
        self._canceled = False
        self._lost = False
        self._renewed_at = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="pulse", daemon=True)

    def start(self) -> None:
        """Beats from now on."""
        self._thread.start()

    def on_step(self, progress: "Progress") -> None:
        """Notes the progress, and raises what is due as `check` does."""
        self._progress = progress
        self.check()

    def on_relief(self, relief: "Relief") -> None:
        """Notes what was given up where memory did not suffice, for the job's timeline."""
        log.warning("memory.relieved", rung=relief.rung, what=relief.sentence)
        self._notes.append(relief.sentence)

    def check(self) -> None:
        """Raises `LeaseLost`, `GenerationCanceled` or `GenerationHandedBack` when that is due."""
        if self._lost:
            raise LeaseLost("another worker has this job by now")
        if self._canceled:
            raise GenerationCanceled("the caller wants it no more")
        if self._shutdown.is_overdue:
            raise GenerationHandedBack("this worker is shutting down")

    def write_notes(self) -> None:
        """Writes what was noted and is not written yet; what the database does not take now stays noted."""
        with self._writing_notes:
            try:
                while self._notes:
                    with self._database.write() as transaction:
                        lifecycle.note(transaction, self._lease, "memory_relieved", {"what": self._notes[0]})
                    self._notes.popleft()
            except SQLAlchemyError as fault:
                log.warning("job.not_noted", job_id=str(self._lease.job_id), error=type(fault).__name__)

    def stop(self) -> None:
        """No more beats, but what was noted is written. The lease stands until it runs out or the job ends."""
        self._stopped.set()
        self._thread.join()
        self.write_notes()

    def _beat_on(self) -> None:
        while not self._lost and not self._stopped.wait(self._interval_s):
            self._beat()
            self.write_notes()

    def _beat(self) -> None:
        progress = self._progress
        values = (progress.phase, progress.step, progress.steps) if progress is not None else None
        try:
            with self._database.write() as transaction:
                beat = lifecycle.heartbeat(transaction, self._lease, self._lease_s, values)
        except SQLAlchemyError as fault:
            log.warning("job.heartbeat_failed", job_id=str(self._lease.job_id), error=type(fault).__name__)
            self._lost = time.monotonic() - self._renewed_at > self._lease_s
            return
        if beat is None:
            self._lost = True
        else:
            self._renewed_at = time.monotonic()
            self._canceled = beat.cancel_requested
