"""A cable to a service: tests cut it, hold it, and put it in again.

Takes a loopback address; gives another that leads there. Cut, it refuses; held, it accepts and never answers, as a
service does whose machine has stopped.
"""

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.services.process import free_port

PIECE_BYTES = 65_536


class Cable:
    """Carries connections from `port` to `target` while it is in."""

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self._target = target
        self._listener: socket.socket | None = None
        self._held = False
        self._breaks_after: int | None = None
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def plug(self) -> None:
        """Connections go through."""
        self._listen(held=False)

    def hold(self) -> None:
        """New connections are accepted and hear nothing; the old ones end."""
        self._listen(held=True)

    def break_after(self, size: int) -> None:
        """Each new connection ends when it has carried this many bytes there."""
        self._breaks_after = size
        self.plug()

    def cut(self) -> None:
        """Every connection ends, and new ones are refused."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            self._listener.close()
            self._listener = None
        with self._lock:
            ending, self._open = self._open, set()
        for end in ending:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _listen(self, held: bool) -> None:
        self.cut()
        self._held = held
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            self._keep(near)
            if self._held:
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()
                continue
            self._keep(far)
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _keep(self, end: socket.socket) -> None:
        with self._lock:
            self._open.add(end)

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        carried = 0
        with contextlib.suppress(OSError):
            while piece := source.recv(PIECE_BYTES):
                sink.sendall(piece)
                carried += len(piece)
                if self._breaks_after is not None and carried > self._breaks_after:
                    source.shutdown(socket.SHUT_RDWR)
                    break
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@contextmanager
def cable_to(target: int) -> Iterator[Cable]:
    """A cable that is in."""
    cable = Cable(target)
    cable.plug()
    try:
        yield cable
    finally:
        cable.cut()
