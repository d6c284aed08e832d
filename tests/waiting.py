"""Wait for a condition instead of sleeping."""

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def wait_until(condition: Callable[[], Found], timeout_s: float = 30.0, every_s: float = 0.02) -> Found:
    """Poll `condition` and return its first true result. Raises `AssertionError` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            name = getattr(condition, "__name__", repr(condition))
            raise AssertionError(f"{name} was not true within {timeout_s:g} s; its last result was {found!r}")
        time.sleep(every_s)
    return found
