"""A server that a test may end and start again, with the same files at the same port."""

import signal
from collections.abc import Callable
from dataclasses import dataclass

from tests.services.process import Running
from tests.waiting import wait_until


@dataclass
class Service:
    """A server that runs, and the two ways to start it and to ask whether it answers."""

    begin: Callable[[], Running]
    answers: Callable[[], bool]
    running: Running

    @classmethod
    def begun(cls, begin: Callable[[], Running], answers: Callable[[], bool]) -> "Service":
        """Start a server, and return it when it answers."""
        service = cls(begin, answers, begin())
        try:
            service.wait()
        except BaseException:
            service.running.stop()
            raise
        return service

    def wait(self, timeout_s: float = 60.0) -> None:
        """Wait until it answers. Raises `RuntimeError` with the end of its log if it ends before that."""

        def is_ready() -> bool:
            self.running.check()
            return self.answers()

        wait_until(is_ready, timeout_s, every_s=0.05)

    def restart(self, number: int = signal.SIGTERM) -> None:
        """End it by this signal, start it again, and wait until it answers."""
        self.running.stop(number)
        self.running = self.begin()
        self.wait()
