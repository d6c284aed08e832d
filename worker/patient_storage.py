"""Storage as jobs use it: reads and writes outlast an outage, and a request that hangs can be left.

An outage is nobody's fault, so it ends no attempt: while storage is away, whoever needs it waits. Only an object that
storage refuses although it answers otherwise is given up after a time.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from worker.abandonable import CHECK_INTERVAL_S, call
from worker.backoff import pauses
from worker.breaker import Breaker
from zcore.errors import StorageError
from zcore.storage import Storage
from zcore.storage_keys import PROBE_KEY
from zcore.telemetry import log

T = TypeVar("T")

Check = Callable[[], None]
"""Raises when the caller must stop waiting."""

# The first retry follows the successful probe at once.
RETRY_BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class PatientStorage:
    """A storage whose reads and writes are repeated until they succeed. Safe to share between threads."""

    def __init__(self, storage: Storage, patience_s: float, on_return: Callable[[], None]) -> None:
        """`patience_s` bounds how long one object is retried while storage answers otherwise.

        `on_return` is called when storage is back after an outage.
        """
        self._storage = storage
        self._patience_s = patience_s
        self._breaker = Breaker("storage", self._probe, StorageError, on_return)

    @property
    def is_away(self) -> bool:
        """Whether storage is known to be away."""
        return self._breaker.is_open

    def get(self, key: str, check: Check) -> bytes:
        """Return an object's bytes. Raises `NotFound`, `StorageError` after the patience, and what `check` raises."""
        return self._repeat(partial(self._storage.get, key), key, check)

    def put(self, key: str, content: bytes, content_type: str, check: Check) -> None:
        """Store an object. Raises as `get` does."""
        self._repeat(partial(self._storage.put, key, content, content_type), key, check)

    def _repeat(self, work: Callable[[], T], key: str, check: Check) -> T:
        refused_since: float | None = None
        pauses_s = pauses(RETRY_BACKOFF_S)
        while True:
            try:
                return call(work, check, "storage")
            except StorageError as fault:
                check()
                was_away, now = self._wait_while_away(check), time.monotonic()
                refused_since = None if was_away else refused_since or now
                if refused_since is not None and now - refused_since >= self._patience_s:
                    raise
                log.warning("storage.retried", key=key, error=fault.message)
                _pause(next(pauses_s), check)

    def _wait_while_away(self, check: Check) -> bool:
        """After a failure, wait until storage answers. Return whether it was away, and not only refused an object."""
        was_away, outages = self._breaker.is_open, self._breaker.outages
        self._breaker.report_failure()
        while not self._breaker.wait(CHECK_INTERVAL_S):
            check()
        return was_away or self._breaker.outages > outages

    def _probe(self) -> None:
        """Raise `StorageError` if objects cannot be written. A store that is full still answers reads."""
        self._storage.put(PROBE_KEY, b"probe", "text/plain")
        self._storage.delete([PROBE_KEY])


def _pause(seconds: float, check: Check) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check()
        time.sleep(min(left, CHECK_INTERVAL_S))
