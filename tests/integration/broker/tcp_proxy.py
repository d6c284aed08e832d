"""TCP proxy to a local service that tests can cut, hold and reconnect, like a network cable.

While cut, connections are refused; while held, they are accepted but never answered, as by a machine that hangs; while
frozen, they stay open and carry nothing.
"""

import contextlib
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager

from tests.services.process import free_port

CHUNK_BYTES = 65_536


class TcpProxy:
    """Forwards connections from `port` to the local port `target` while plugged in."""

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self._target = target
        self._listener: socket.socket | None = None
        self._held = False
        self._breaks_after: int | None = None
        self._flowing = threading.Event()
        self._flowing.set()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def plug(self) -> None:
        """Forward connections."""
        self._listen(held=False)

    def hold(self) -> None:
        """Accept new connections without answering; end the existing ones."""
        self._listen(held=True)

    def break_after(self, size: int) -> None:
        """End each new connection after it has forwarded `size` bytes in one direction."""
        self._breaks_after = size
        self.plug()

    @contextmanager
    def frozen(self) -> Generator[None]:
        """Keep all connections open during the block, and the bytes back."""
        self._flowing.clear()
        try:
            yield
        finally:
            self._flowing.set()

    def cut(self) -> None:
        """End every connection and refuse new ones."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # unblocks the accepting thread
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
            self._register(near)
            if self._held:
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()
                continue
            self._register(far)
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _register(self, end: socket.socket) -> None:
        with self._lock:
            self._open.add(end)

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        forwarded = 0
        with contextlib.suppress(OSError):
            while chunk := source.recv(CHUNK_BYTES):
                self._flowing.wait()
                sink.sendall(chunk)
                forwarded += len(chunk)
                if self._breaks_after is not None and forwarded > self._breaks_after:
                    source.shutdown(socket.SHUT_RDWR)
                    break
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@contextmanager
def proxy_to(target: int) -> Generator[TcpProxy]:
    """Plug in a cable to the local port `target`; cut at the end."""
    cable = TcpProxy(target)
    cable.plug()
    try:
        yield cable
    finally:
        cable.cut()
