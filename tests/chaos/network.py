"""TCP links between processes that can be cut, refused, frozen, half-closed, slowed, or lose an answer.

All links of a run share one event loop in a thread of its own, which also runs the callers.
"""

import asyncio
import contextlib
import random
import socket
import threading
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from tests.services.process import free_port

CHUNK_BYTES = 65_536
CONTINUE = b"HTTP/1.1 100"
Value = TypeVar("Value")


@dataclass(frozen=True)
class Behavior:
    """What a link does to what passes through it. The default passes everything on."""

    refuses: bool = False
    frozen: bool = False
    """Connections are accepted, and nothing passes."""
    delay_s: float = 0.0
    """Delay of every chunk, in each direction."""
    loses_answers_to: bytes | None = None
    """A request that contains these bytes is passed on; instead of its answer, the connection ends."""
    loss_rate: float = 1.0
    answers: bytes | None = None
    """The answer to every HTTP request, which is not passed on."""


NORMAL = Behavior()


class Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self._at_end: list[Callable[[], None]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Value], timeout_s: float | None = 30.0) -> Value:
        """Run a coroutine in the loop from another thread, and return its result."""
        return self.begin(coroutine).result(timeout_s)

    def begin(self, coroutine: Coroutine[Any, Any, Value]) -> Future[Value]:
        """Begin a coroutine in the loop from another thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, function: Callable[[], object]) -> None:
        """Call a function in the loop soon."""
        self._loop.call_soon_threadsafe(function)

    def at_end(self, close: Callable[[], None]) -> None:
        """Call a function in the loop when the loop is closed."""
        self._at_end.append(close)

    def close(self) -> None:
        """Close what listens and cancel everything that runs in the loop, then end it."""
        self.run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        for close in self._at_end:
            close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


@contextmanager
def looping() -> Generator[Loop]:
    """Run a loop during the block."""
    loop = Loop()
    try:
        yield loop
    finally:
        loop.close()


@dataclass(eq=False)
class _Connection:
    near: asyncio.StreamWriter
    far: asyncio.StreamWriter | None = None
    losing: bool = False
    half_closed: bool = False

    def end(self) -> None:
        for writer in (self.near, self.far):
            if writer is not None:
                writer.transport.abort()


class Link:
    """Forwards connections from `port` to one of the local ports `targets` that accepts, to each as often."""

    def __init__(self, loop: Loop, *targets: int, seed: int = 0) -> None:
        self.port = free_port()
        self.lost_answers = 0
        self._loop = loop
        self._targets = list(targets)
        self._random = random.Random(seed)
        self._behavior = NORMAL
        self._connections: set[_Connection] = set()
        self._changed = asyncio.Event()
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        loop.run(self._behave(NORMAL))
        loop.at_end(self._refuse)

    def behave(self, behavior: Behavior) -> None:
        """Behave like this from now on, on existing connections too. A refusal and a fixed answer end them first."""
        self._loop.run(self._behave(behavior))

    def cut(self) -> None:
        """End every connection; new ones are accepted."""
        self._loop.run(self._cut())

    def half_close(self) -> None:
        """End one direction of every connection, the one from the service."""
        self._loop.run(self._half_close())

    @property
    def open_connections(self) -> int:
        """Number of connections that pass through it now."""
        return len(self._connections)

    def _listen(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=512)
        self._listener.setblocking(False)
        asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)

    def _refuse(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def _accept(self, listener: socket.socket) -> None:
        """Accept in one step: a connection that is accepted is known, and one that is not is refused by the kernel."""
        with contextlib.suppress(BlockingIOError):
            task = asyncio.create_task(self._connected(listener.accept()[0]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _behave(self, behavior: Behavior) -> None:
        before, self._behavior = self._behavior, behavior
        self._changed.set()
        self._changed = asyncio.Event()
        if behavior.refuses:
            self._refuse()
        if behavior.refuses or behavior.answers is not None or before.answers is not None:
            await self._cut()
        if not behavior.refuses and self._listener is None:
            self._listen()

    async def _cut(self) -> None:
        for connection in list(self._connections):
            connection.end()

    async def _half_close(self) -> None:
        for connection in list(self._connections):
            connection.half_closed = True
            with contextlib.suppress(OSError):
                connection.near.write_eof()

    async def _connected(self, accepted: socket.socket) -> None:
        near_reader, near = await asyncio.open_connection(sock=accepted)
        connection = _Connection(near)
        self._connections.add(connection)
        try:
            if self._behavior.refuses:
                return  # it was accepted just before
            if self._behavior.answers is not None:
                await self._answer(near_reader, near, self._behavior.answers)
                return
            opened = await self._open()
            if opened is None:
                return
            far_reader, connection.far = opened
            await asyncio.gather(
                self._forward(connection, near_reader, connection.far, to_service=True),
                self._forward(connection, far_reader, near, to_service=False),
            )
        except OSError:
            pass
        finally:
            self._connections.discard(connection)
            connection.end()

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        self._targets.append(self._targets.pop(0))
        for target in list(self._targets):
            with contextlib.suppress(OSError):
                return await asyncio.open_connection("127.0.0.1", target)
        return None

    async def _forward(
        self, connection: _Connection, source: asyncio.StreamReader, sink: asyncio.StreamWriter, to_service: bool
    ) -> None:
        while chunk := await source.read(CHUNK_BYTES):
            while self._behavior.frozen:
                await self._changed.wait()
            behavior = self._behavior
            if behavior.delay_s:
                await asyncio.sleep(behavior.delay_s)
            if to_service and behavior.loses_answers_to is not None and behavior.loses_answers_to in chunk:
                connection.losing = self._random.random() < behavior.loss_rate
            elif not to_service and connection.losing and not chunk.startswith(CONTINUE):
                self.lost_answers += 1
                connection.end()
                return
            if to_service or not connection.half_closed:
                sink.write(chunk)
                await sink.drain()
        with contextlib.suppress(OSError, RuntimeError):
            if sink.can_write_eof():
                sink.write_eof()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: bytes) -> None:
        """Answer one request before its body has been read, as an overloaded service does, then read the rest."""
        with contextlib.suppress(asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
            writer.write(answer)
            await writer.drain()
            while await asyncio.wait_for(reader.read(CHUNK_BYTES), 5):
                pass


def http_answer(status: int, reason: str, body: bytes = b"") -> bytes:
    """Return an HTTP answer that ends its connection."""
    head = f"HTTP/1.1 {status} {reason}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    return head.encode() + body
