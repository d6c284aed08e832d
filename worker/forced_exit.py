"""Ends the process in limited time after shutdown has begun, whatever its threads wait for.

A thread that waits for a GPU, a bucket or a receiver cannot be stopped, only left.
"""

import os
import threading
import time
from collections.abc import Callable

from worker.shutdown import Shutdown
from zcore.telemetry import log

EXIT_MARGIN_S = 5.0
"""How long an orderly end may take after the grace period."""
POLL_INTERVAL_S = 0.2


def force_exit_when_overdue(shutdown: Shutdown, status: Callable[[], int]) -> None:
    """Exit with the status that `status` returns, if the process still runs `EXIT_MARGIN_S` after the grace period."""

    def run() -> None:
        while not shutdown.wait(timeout_s=3600):
            pass
        while shutdown.overdue_s < EXIT_MARGIN_S:
            time.sleep(POLL_INTERVAL_S)
        leave(status())

    threading.Thread(target=run, name="forced-exit", daemon=True).start()


def leave(status: int) -> None:
    """Exit at once, without waiting for any thread."""
    waiting = sorted(thread.name for thread in threading.enumerate() if not thread.daemon)
    log.error("worker.forced_exit", status=status, threads=waiting)
    os._exit(status)
