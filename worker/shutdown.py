"""Shutdown flag: set once by a signal handler, polled by every thread."""

import threading
import time
from collections.abc import Callable


class Shutdown:
    """Begins once. The current job may finish within `grace_s` seconds; after that it is handed back."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._begun = threading.Event()
        self._overdue_at = float("inf")
        self._callbacks: list[Callable[[], None]] = []

    def begin(self) -> None:
        """Stop new work from being started. Further calls have no effect."""
        if not self._begun.is_set():
            self._overdue_at = time.monotonic() + self._grace_s
            self._begun.set()
            for callback in self._callbacks:
                callback()

    def hurry(self, grace_s: float) -> None:
        """Begin, and end the grace period in at most `grace_s` seconds from now."""
        self.begin()
        self._overdue_at = min(self._overdue_at, time.monotonic() + grace_s)

    def on_begin(self, callback: Callable[[], None]) -> None:
        """Call `callback` when shutdown begins, or now if it has begun.

        `callback` may run in a signal handler and may be called twice.
        """
        self._callbacks.append(callback)
        if self.is_begun:
            callback()

    @property
    def is_begun(self) -> bool:
        """Whether no new work may be started."""
        return self._begun.is_set()

    @property
    def is_overdue(self) -> bool:
        """Whether the grace period is over, so that the current job must return to the queue."""
        return self.overdue_s >= 0

    @property
    def overdue_s(self) -> float:
        """Seconds since the grace period ended; negative before."""
        return time.monotonic() - self._overdue_at

    def wait(self, timeout_s: float) -> bool:
        """Sleep until shutdown begins or `timeout_s` has passed. Return whether shutdown has begun."""
        return self._begun.wait(timeout_s)
