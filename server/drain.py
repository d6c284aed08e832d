"""Draining: between SIGTERM and the end of the API, it serves on while load balancers learn that it is not ready.

Without this, connections that arrive while the listener closes are reset.
"""

import asyncio
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Drain:
    """Begins once, at the first stop signal; `on_begin` is then called, in a signal handler."""

    def __init__(self, duration_s: float, on_begin: Callable[[], None]) -> None:
        self._duration_s = duration_s
        self._on_begin = on_begin
        self.has_begun = False

    @contextmanager
    def delaying_signals(self) -> Generator[None]:
        """Hand SIGTERM to the server that runs the application only after the drain.

        A second signal, and Ctrl-C, are handed on at once. Must be entered in the event loop of that server, which has
        its handlers in place by then, set by `signal.signal` as uvicorn does; without handlers nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        previous = {number: handler for number in STOP_SIGNALS if callable(handler := signal.getsignal(number))}

        def handle(number: int, frame: FrameType | None) -> None:
            hand_on = partial(previous[signal.Signals(number)], number, frame)
            is_delayed = number == signal.SIGTERM and not self.has_begun and self._duration_s > 0
            self._begin()
            if is_delayed:
                loop.call_soon_threadsafe(loop.call_later, self._duration_s, hand_on)
            else:
                hand_on()

        for number in previous:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _begin(self) -> None:
        if not self.has_begun:
            self.has_begun = True
            self._on_begin()
