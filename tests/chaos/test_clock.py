"""The clocks of a chaos run jump while a process uses them, and only the wall clock does."""

import subprocess
import sys
import time
from collections.abc import Callable, Generator

import pytest

from tests.services import clock
from tests.services.clock import Clock

HOUR_S = 3600
PROGRAM = """
import sys, time, datetime
for _ in sys.stdin:
    began = time.monotonic()
    time.sleep(0.01)
    print(time.time(), datetime.datetime.now().timestamp(), began, time.monotonic() - began, flush=True)
"""


@pytest.fixture
def new_clock() -> Generator[Callable[[str], Clock]]:
    with clock.adjustable() as make:
        yield make


def test_a_clock_is_set_while_a_process_runs(new_clock: Callable[[str], Clock]) -> None:
    adjusted = new_clock("host")
    command = [*adjusted.prefix, sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for offset_s in (0, 30 * HOUR_S, -HOUR_S, 0):
            adjusted.set(offset_s)
            before = time.time(), time.monotonic()
            process.stdin.write("\n")
            process.stdin.flush()
            wall, wall_of_datetime, monotonic, slept_s = map(float, process.stdout.readline().split())
            after = time.time(), time.monotonic()
            assert before[0] <= wall - offset_s <= after[0]
            assert before[0] <= wall_of_datetime - offset_s <= after[0]
            assert before[1] <= monotonic <= after[1]
            assert slept_s >= 0.01
        process.stdin.close()
