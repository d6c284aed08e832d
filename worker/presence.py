"""This worker's sign on the list of workers, renewed every few seconds by a thread of its own."""

import threading
from collections.abc import Collection

from sqlalchemy.exc import SQLAlchemyError

from worker.shutdown import Shutdown
from zcore.jobs import presence
from zcore.jobs.database import Database
from zcore.stages import Stage
from zcore.telemetry import log


class Presence:
    """Shows the worker from `start` to `stop`."""

    def __init__(
        self,
        database: Database,
        name: str,
        model: str,
        device: str,
        stages: Collection[Stage],
        shutdown: Shutdown,
    ) -> None:
        self._database = database
        self._name = name
        self._model = model
        self._device = device
        self._stages = stages
        self._shutdown = shutdown
        self._thread = threading.Thread(target=self._show_on, name="presence", daemon=True)

    def start(self) -> None:
        """On the list from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Off the list, once shutdown has begun."""
        self._thread.join()
        try:
            with self._database.write() as transaction:
                presence.leave(transaction, self._name)
        except SQLAlchemyError as fault:
            log.warning("presence.failed", error=type(fault).__name__)

    def _show_on(self) -> None:
        while True:
            try:
                with self._database.write() as transaction:
                    presence.show(transaction, self._name, self._model, self._device, self._stages)
            except SQLAlchemyError as fault:
                log.warning("presence.failed", error=type(fault).__name__)
            if self._shutdown.wait(presence.SHOWN_EVERY_S):
                return
