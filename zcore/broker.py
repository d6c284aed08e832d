"""The doorbell: a Celery app that both processes agree on, and a thread that rings it.

Takes the broker's settings; gives the app, the names on it, and `Doorbell`. A ring carries nothing that the database
does not know better: it only wakes a worker of the stage it is for, which then claims what is due. Lost, doubled and
late rings are harmless. Contains no task code.
"""

import contextlib
import queue
import threading
from pathlib import Path
from typing import Any

from celery import Celery

from zcore.settings import Settings
from zcore.stages import Stage
from zcore.telemetry import log

DRAIN_TASK = "zimage.drain"
# A ring that nobody heard for this long is worth nothing: the clock rings again for jobs that still wait.
RING_LIFE_S = 60
PENDING_RINGS = 64
REDIS_OPTIONS: dict[str, Any] = {
    # A hung Redis must not hold a publisher: without these a publish blocked for more than 45 s.
    "socket_timeout": 5,
    "socket_connect_timeout": 2,
    "socket_keepalive": True,
    "health_check_interval": 25,
    "global_keyprefix": "zimage:",
}


def queue_of(stage: Stage) -> str:
    """The queue in which the rings for one stage wait."""
    return f"zimage.{stage}"


def make_app(settings: Settings) -> Celery:
    """The Celery app of this installation; a folder in `data_dir` is the broker where no URL is set."""
    app = Celery("zimage", broker=settings.broker.url or "filesystem://localhost")
    options: dict[str, Any] = {}
    if not settings.broker.url:
        options = _folder_options(settings.data_path / "broker")
    elif settings.broker.url.startswith(("redis", "rediss", "sentinel")):
        options = REDIS_OPTIONS
    app.conf.update(
        broker_transport_options=options,
        # A worker waits for its broker as long as it takes; the database lets no job be lost meanwhile.
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        task_default_queue=queue_of(Stage.GENERATE),
        task_ignore_result=True,
        # Acknowledged when taken: who works on what is the database's business, and a lost ring is rung again.
        task_acks_late=False,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
    )
    return app


class Doorbell:
    """Rings from a thread of its own, so that neither a slow nor a dead broker can hold a request."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._pending: queue.Queue[Stage | None] = queue.Queue(maxsize=PENDING_RINGS)
        self._thread = threading.Thread(target=self._ring_on, name="doorbell", daemon=True)
        self._thread.start()

    def announce(self, stage: Stage) -> None:
        """Wakes one worker of `stage`, soon. Never blocks, never raises: one more ring than many adds nothing."""
        with contextlib.suppress(queue.Full):
            self._pending.put_nowait(stage)

    def close(self, timeout_s: float = 2.0) -> None:
        """Rings what is pending and ends the thread; with a broker that does not answer, gives up after a while."""
        try:
            self._pending.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _ring_on(self) -> None:
        while (stage := self._pending.get()) is not None:
            try:
                self._app.send_task(
                    DRAIN_TASK,
                    queue=queue_of(stage),
                    expires=RING_LIFE_S,
                    retry_policy={"max_retries": 1, "interval_start": 0.1},
                )
            except Exception as fault:
                # Whatever it was (a full Redis answers with errors of its own kind): the next ring is another matter.
                log.warning("doorbell.failed", error=f"{type(fault).__name__}: {fault}")


def _folder_options(folder: Path) -> dict[str, Any]:
    """kombu's filesystem transport: both ends use one folder, looked at twenty times a second."""
    for name in ("queue", "processed", "control"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return {
        "data_folder_in": str(folder / "queue"),
        "data_folder_out": str(folder / "queue"),
        "processed_folder": str(folder / "processed"),
        "control_folder": str(folder / "control"),
        "polling_interval": 0.05,
    }
