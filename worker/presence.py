"""Registration of this worker in the list of workers, renewed every few seconds."""

from collections.abc import Callable, Collection

from worker.periodic import PeriodicTask
from worker.shutdown import Shutdown
from zcore.jobs import workers
from zcore.jobs.database import Database, DatabaseError
from zcore.jobs.workers import CacheCounts
from zcore.stages import Stage
from zcore.telemetry import log


class Presence:
    """This worker's entry in the list of workers, from `start` to `stop`."""

    def __init__(
        self,
        database: Database,
        name: str,
        model: str,
        device: str,
        stages: Collection[Stage],
        shutdown: Shutdown,
        cache_counts: Callable[[], CacheCounts],
    ) -> None:
        self._database = database
        self._name = name
        self._model = model
        self._device = device
        self._stages = stages
        self._cache_counts = cache_counts
        self._task = PeriodicTask("presence", self._renew, workers.REPORT_INTERVAL_S, shutdown, run_at_start=True)

    def start(self) -> None:
        """Add the worker to the list, and renew its entry until shutdown begins."""
        self._task.start()

    def stop(self) -> None:
        """Remove the worker from the list."""
        self._task.stop()
        try:
            with self._database.write() as transaction:
                workers.remove(transaction, self._name)
        except DatabaseError as fault:
            log.warning("presence.removal_failed", error=type(fault).__name__)

    def _renew(self) -> None:
        try:
            with self._database.write() as transaction:
                workers.report(transaction, self._name, self._model, self._device, self._stages, self._cache_counts())
        except DatabaseError as fault:
            log.warning("presence.renewal_failed", error=type(fault).__name__)
