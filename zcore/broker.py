"""The broker: a Celery app shared by the server and the workers, and a thread that publishes notifications.

A notification carries no data: it makes a worker of the given stage claim due jobs from the database. Lost, duplicate
and late notifications are harmless. Contains no task code.
"""

import contextlib
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from celery import Celery

from zcore.broker_transports import (
    DRAIN_TASK,
    FOLDER_TRANSPORT,
    REDIS_TRANSPORT,
    SENTINEL_TRANSPORT,
    remove_lost_drafts,
)
from zcore.settings import Settings
from zcore.stages import Stage
from zcore.telemetry import log

# An unread notification expires: maintenance notifies idle workers again of jobs that are still queued.
NOTIFICATION_TTL_S = 60
MAX_PENDING_NOTIFICATIONS = 64
REDIS_OPTIONS: dict[str, Any] = {
    # A hung Redis must not block a publisher: without these, publishing blocked for more than 45 s.
    "socket_timeout": 5,
    "socket_connect_timeout": 2,
    "socket_keepalive": True,
    "health_check_interval": 25,
    "global_keyprefix": "zimage:",
}


def queue_name(stage: Stage) -> str:
    """Return the name of the queue for the notifications of one stage."""
    return f"zimage.{stage}"


def make_app(settings: Settings) -> Celery:
    """Return the Celery app of this installation. If no broker URL is set, the broker is a folder in `data_dir`."""
    transport, options = _transport(settings)
    app = Celery("zimage", broker=settings.broker.url or "filesystem://localhost")
    app.conf.update(
        broker_transport=transport,
        broker_transport_options=options,
        # A worker waits for its broker indefinitely; meanwhile no job is lost, since jobs are in the database.
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        task_default_queue=queue_name(Stage.GENERATE),
        task_ignore_result=True,
        # Acknowledged on receipt: the database assigns jobs, and maintenance repeats lost notifications.
        task_acks_late=False,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
        # Whoever reaches the broker could otherwise stop every worker.
        worker_enable_remote_control=False,
    )
    return app


class Notifier:
    """Publisher of notifications in a background thread, so that a slow or dead broker cannot block a request."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._pending: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=MAX_PENDING_NOTIFICATIONS)
        self._thread = threading.Thread(target=self._publish_pending, name="notifier", daemon=True)
        self._thread.start()

    def notify(self, stage: Stage) -> None:
        """Notify one worker of `stage` soon. Never blocks or raises: if too many are pending, this one is dropped."""
        self._soon(partial(self._publish, stage))

    def notify_again(self, stage: Stage, unread: int) -> None:
        """Publish notifications of `stage` soon, until as many as `unread` are unread; otherwise as `notify`.

        However long nobody reads them, no more than that pile up.
        """
        self._soon(partial(self._fill_up, stage, unread))

    def close(self, timeout_s: float = 2.0) -> None:
        """Publish the pending notifications, then end the thread; wait at most `timeout_s` for each of the two."""
        try:
            self._pending.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _soon(self, publish: Callable[[], None]) -> None:
        with contextlib.suppress(queue.Full):
            self._pending.put_nowait(publish)

    def _publish_pending(self) -> None:
        while (publish := self._pending.get()) is not None:
            try:
                publish()
            except Exception as fault:
                # No error may end the thread, whatever its class: a full Redis, for example, raises classes of its own.
                log.warning("notifier.failed", error=f"{type(fault).__name__}: {fault}")

    def _publish(self, stage: Stage) -> None:
        self._app.send_task(
            DRAIN_TASK,
            queue=queue_name(stage),
            expires=NOTIFICATION_TTL_S,
            retry_policy={"max_retries": 1, "interval_start": 0.1},
        )

    def _fill_up(self, stage: Stage, unread: int) -> None:
        for _ in range(self._count_unread(stage), unread):
            self._publish(stage)

    def _count_unread(self, stage: Stage) -> int:
        connection: Any
        with cast(Any, self._app).connection_or_acquire() as connection:
            # As Celery declares it, not passively: then kombu asks Redis for the key without its prefix.
            declared = connection.default_channel.queue_declare(queue_name(stage), durable=True, auto_delete=False)
            return declared.message_count


def _transport(settings: Settings) -> tuple[str | None, dict[str, Any]]:
    """Return the transport of the broker and its options; None leaves the choice to the URL."""
    url = settings.broker.url
    if not url:
        folder = settings.data_path / "broker" / "queue"
        folder.mkdir(parents=True, exist_ok=True)
        remove_lost_drafts(folder)
        return FOLDER_TRANSPORT, {"folder": str(folder), "polling_interval": 0.05}
    if url.startswith("sentinel"):
        return SENTINEL_TRANSPORT, REDIS_OPTIONS
    return (REDIS_TRANSPORT, REDIS_OPTIONS) if url.startswith("redis") else (None, {})
