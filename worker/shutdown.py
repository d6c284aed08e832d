"""The worker's wish to end: said once by a signal, read by every thread.

Knows when it was said, and so when the job in hand has had its time.
"""

import threading
import time


class Shutdown:
    """Begins once. For `grace_s` seconds the job in hand may finish; after that it is handed back."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._begun = threading.Event()
        self._overdue_at = float("inf")

    def begin(self) -> None:
        """From now on nothing new is started. Saying it again changes nothing."""
        if not self._begun.is_set():
            self._overdue_at = time.monotonic() + self._grace_s
            self._begun.set()

    @property
    def is_begun(self) -> bool:
        """Whether nothing new is to be started."""
        return self._begun.is_set()

    @property
    def is_overdue(self) -> bool:
        """Whether the job in hand has to go back to the queue."""
        return time.monotonic() >= self._overdue_at

    def wait(self, timeout_s: float) -> bool:
        """Sleeps until shutdown begins or the time is over; True when it has begun."""
        return self._begun.wait(timeout_s)
