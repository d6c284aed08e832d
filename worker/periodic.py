"""A thread that calls a function at a fixed interval, for heartbeats, presence, maintenance and webhook delivery."""

import threading
from collections.abc import Callable

from worker.shutdown import Shutdown
from zcore.telemetry import log


class PeriodicTask:
    """Calls `run` every `interval_s` seconds from `start` until it is stopped or shutdown begins.

    `run` handles its own errors. An exception that it raises is logged with the task's name, and the calls continue.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[], None],
        interval_s: float,
        shutdown: Shutdown | None = None,
        *,
        run_at_start: bool = False,
    ) -> None:
        """Without a `shutdown`, only `stop` and `request_stop` end the calls.

        With `run_at_start` the first call is made at once, otherwise after the first interval.
        """
        self._name = name
        self._run = run
        self._interval_s = interval_s
        self._shutdown = shutdown
        self._run_at_start = run_at_start
        self._stopping = threading.Event()
        self._triggered = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread. May be called once."""
        if self._shutdown is not None:
            self._shutdown.on_begin(self.request_stop)
        self._thread.start()

    def trigger(self) -> None:
        """Make the next call now. If a call is in progress, one more follows it."""
        self._triggered.set()

    def request_stop(self) -> None:
        """Make no further calls. Does not wait for the current one, so `run` may use it."""
        self._stopping.set()
        self._triggered.set()

    def stop(self) -> None:
        """Make no further calls, and wait for the current one."""
        self.request_stop()
        self._thread.join()

    def _loop(self) -> None:
        if self._run_at_start:
            self._call()
        while not self._stopping.is_set():
            self._triggered.wait(self._interval_s)
            self._triggered.clear()
            self._call()

    def _call(self) -> None:
        if self._stopping.is_set():
            return
        try:
            self._run()
        except Exception as fault:
            # If the thread ended here, its task would not run again in this process.
            log.error("periodic_task.crashed", task=self._name, exc_info=fault)
