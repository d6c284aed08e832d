"""Breaker: knows whether a service that jobs need is away, so that no job is begun that could not be finished.

Does not know what the service is. Safe to share between threads.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait

from worker.abandonable import in_daemon_thread
from worker.backoff import pauses
from zcore.telemetry import log

PROBE_TIMEOUT_S = 10.0
PROBE_BACKOFF_S = (0.5, 1.0, 2.0, 5.0)


class Breaker:
    """Probes a service after each reported failure; open from the first failed probe until one succeeds."""

    def __init__(
        self, name: str, probe: Callable[[], None], failure: type[Exception], on_close: Callable[[], None]
    ) -> None:
        """`probe` raises `failure` while the service is away. `on_close` is called when it is back."""
        self._name = name
        self._probe = probe
        self._failure = failure
        self._on_close = on_close
        self._is_open = False
        self._asked: Future[None] | None = None  # the probe that has begun and not ended
        self._known = threading.Event()  # not while probing
        self._known.set()
        self._lock = threading.Lock()
        self.outages = 0
        """Number of times that the service was found to be away."""

    @property
    def is_open(self) -> bool:
        """Whether the service is known to be away."""
        return self._is_open

    def report_failure(self) -> None:
        """Begin to probe in another thread, unless that has begun."""
        with self._lock:
            if not self._known.is_set():
                return
            self._known.clear()
        threading.Thread(target=self._probe_until_answered, name=f"probe-{self._name}", daemon=True).start()

    def wait(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` for a probe to succeed. Return whether no probe is needed any more."""
        return self._known.wait(timeout_s)

    def _probe_until_answered(self) -> None:
        pauses_s = pauses(PROBE_BACKOFF_S)
        try:
            while not self._answers():
                time.sleep(next(pauses_s))
        finally:
            # After an unexpected error too: then jobs meet the service's errors themselves.
            was_open, self._is_open = self._is_open, False
            self._known.set()
        if was_open:
            log.info(f"{self._name}.returned")
            self._on_close()

    def _answers(self) -> bool:
        try:
            self._ask()
        except (self._failure, TimeoutError) as fault:
            if not self._is_open:
                log.warning(f"{self._name}.away", error=str(fault))
                self.outages += 1
                self._is_open = True
            return False
        return True

    def _ask(self) -> None:
        """Raise what a probe raises. While one hangs no other begins: each would cost a thread, and hang too."""
        if self._asked is None:
            self._asked = in_daemon_thread(self._probe, f"probe-{self._name}")
        if not wait([self._asked], PROBE_TIMEOUT_S).done:
            raise TimeoutError(f"probe-{self._name} did not end within {PROBE_TIMEOUT_S:g} s")
        ended, self._asked = self._asked, None
        ended.result()
