"""Blocking calls that can be left: a call that never returns costs a thread, not the job or the shutdown."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")

CHECK_INTERVAL_S = 0.2


def in_daemon_thread(work: Callable[[], T], name: str) -> Future[T]:
    """Start blocking work in a thread of its own, which does not keep the process from exiting."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            result = work()
        except Exception as fault:
            outcome.set_exception(fault)
        else:
            outcome.set_result(result)

    outcome.set_running_or_notify_cancel()
    context = copy_context()  # of log lines
    threading.Thread(target=context.run, args=[run], name=name, daemon=True).start()
    return outcome


def call(work: Callable[[], T], check: Callable[[], None], name: str) -> T:
    """Return the result of blocking work. If `check`, called several times a second, raises, the work is abandoned."""
    outcome = in_daemon_thread(work, name)
    while not wait([outcome], CHECK_INTERVAL_S).done:
        check()
    return outcome.result()


def call_within(work: Callable[[], T], timeout_s: float, name: str) -> T:
    """Return the result of blocking work. Raises `TimeoutError` after `timeout_s`, and abandons the work."""
    outcome = in_daemon_thread(work, name)
    if not wait([outcome], timeout_s).done:
        raise TimeoutError(f"{name} did not end within {timeout_s:g} s")
    return outcome.result()
