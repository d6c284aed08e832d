"""A periodic task runs at its interval or when triggered, survives crashes, and stops when asked or at shutdown."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from structlog.testing import capture_logs

from tests.waiting import wait_until
from worker.periodic import PeriodicTask
from worker.shutdown import Shutdown

NEVER_S = 3600.0

Start = Callable[..., PeriodicTask]


class Calls:
    """Counts calls. Each call waits while `gate` is closed, and raises `error` if there is one."""

    def __init__(self) -> None:
        self.count = 0
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def __call__(self) -> None:
        self.count += 1
        self.gate.wait(30)
        if self.error is not None:
            raise self.error


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def start(calls: Calls) -> Iterator[Start]:
    """A function that starts periodic tasks, which are stopped after the test."""
    with ExitStack() as stack:

        def started(interval_s: float, shutdown: Shutdown | None = None, run_at_start: bool = False) -> PeriodicTask:
            task = PeriodicTask("test", calls, interval_s, shutdown, run_at_start=run_at_start)
            task.start()
            stack.callback(task.stop)
            return task

        yield started


def thread_ended(task: PeriodicTask) -> bool:
    return not task._thread.is_alive()


def test_the_function_is_called_at_every_interval(calls: Calls, start: Start) -> None:
    started_at = time.monotonic()
    start(0.02)
    wait_until(lambda: calls.count >= 3)
    assert time.monotonic() - started_at >= 0.06


def test_the_first_call_waits_for_the_interval_or_is_made_at_start(calls: Calls, start: Start) -> None:
    task = start(NEVER_S)
    task.stop()
    assert calls.count == 0
    start(NEVER_S, run_at_start=True)
    wait_until(lambda: calls.count == 1)


def test_a_trigger_makes_the_next_call_at_once(calls: Calls, start: Start) -> None:
    task = start(NEVER_S)
    for expected in (1, 2):
        task.trigger()
        wait_until(lambda expected=expected: calls.count == expected)


def test_triggers_during_a_call_make_exactly_one_more_call(calls: Calls, start: Start) -> None:
    calls.gate.clear()
    task = start(NEVER_S, run_at_start=True)
    wait_until(lambda: calls.count == 1)
    for _ in range(3):
        task.trigger()
    calls.gate.set()
    wait_until(lambda: calls.count == 2)
    task.stop()
    assert calls.count == 2


def test_a_crash_is_logged_with_the_name_and_the_calls_continue(calls: Calls, start: Start) -> None:
    calls.error = ValueError("a defect")
    with capture_logs() as logs:
        start(0.01)
        wait_until(lambda: calls.count >= 2)
    # The process may still have threads of earlier tests, whose events are captured too.
    crashes = [log for log in logs if log["event"] == "periodic_task.crashed" and log["task"] == "test"]
    assert crashes
    assert crashes[0]["exc_info"] is calls.error


def test_stop_waits_for_the_current_call_and_prevents_the_next(calls: Calls, start: Start) -> None:
    calls.gate.clear()
    task = start(0.01)
    wait_until(lambda: calls.count == 1)
    stopping = threading.Thread(target=task.stop)
    stopping.start()
    stopping.join(0.1)
    assert stopping.is_alive()
    calls.gate.set()
    stopping.join(30)
    assert not stopping.is_alive()
    assert thread_ended(task)
    assert calls.count == 1


def test_shutdown_ends_the_calls_without_waiting_for_the_interval(calls: Calls, start: Start) -> None:
    shutdown = Shutdown(grace_s=60)
    task = start(NEVER_S, shutdown)
    shutdown.begin()
    wait_until(lambda: thread_ended(task))
    assert calls.count == 0


def test_a_task_started_after_shutdown_makes_no_call(calls: Calls, start: Start) -> None:
    shutdown = Shutdown(grace_s=60)
    shutdown.begin()
    task = start(0.01, shutdown, run_at_start=True)
    wait_until(lambda: thread_ended(task))
    assert calls.count == 0


def test_the_function_may_end_its_own_task() -> None:
    calls: list[int] = []

    def run() -> None:
        calls.append(1)
        task.request_stop()

    task = PeriodicTask("test", run, 0.01)
    task.start()
    wait_until(lambda: thread_ended(task))
    task.stop()
    assert len(calls) == 1
