"""Fixtures: the application under uvicorn in this process, and raw sockets to it."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11
import httpx
import pytest
import uvicorn

from server.app import create_app
from server.connections import configure
from tests.services.process import free_port
from tests.waiting import wait_until
from zcore.settings import load_settings

KEY = "anna-key-0123456789"
AUTHORIZATION = {"authorization": f"Bearer {KEY}"}


@dataclass(frozen=True)
class Reply:
    """An answer as h11, which is not the library that serves it, understands it."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Served:
    """A running server, to which tests speak bytes. Its event loop runs in `thread`."""

    port: int
    server: uvicorn.Server
    thread: threading.Thread

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def connection(self) -> Iterator[socket.socket]:
        """Open a connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as opened:
            yield opened

    def send(self, request: bytes) -> Reply:
        """Send these bytes on a connection of their own, and return the answer."""
        with self.connection() as connection:
            with contextlib.suppress(ConnectionError):  # an answer may come before the server has read everything
                connection.sendall(request)
            method = request.partition(b" ")[0].decode("latin-1")
            return read_reply(connection, method if method in ("HEAD", "OPTIONS") else "GET")


def read_reply(connection: socket.socket, method: str = "GET") -> Reply:
    """Read one answer. Raises `AssertionError` if the connection ends before there is one."""
    reader = h11.Connection(h11.CLIENT)
    reader.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
    reader.send(h11.EndOfMessage())
    head: h11.Response | None = None
    body = b""
    while not isinstance(event := reader.next_event(), h11.EndOfMessage | h11.ConnectionClosed):
        if event is h11.NEED_DATA:
            reader.receive_data(connection.recv(65536))
        elif isinstance(event, h11.Response):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
    assert head is not None, "the connection ended without an answer"
    return Reply(head.status_code, {name.decode(): value.decode() for name, value in head.headers}, body)


Serving = Callable[..., AbstractContextManager[Served]]


@pytest.fixture(scope="package")
def serving(tmp_path_factory: pytest.TempPathFactory, migrated_file: Path) -> Serving:
    """Return a function that serves the application with settings by their dotted names."""

    @contextmanager
    def serve(**given: Any) -> Iterator[Served]:
        folder = tmp_path_factory.mktemp("edge")
        (folder / "zimage.db").write_bytes(migrated_file.read_bytes())
        names = {name.replace("__", "."): value for name, value in given.items()}
        port = free_port()
        common = {"profile": "demo", "server.api_keys": {"anna": KEY}}
        settings = load_settings({}, {**common, "data_dir": str(folder), "server.port": port, **names})
        server = uvicorn.Server(configure(create_app(settings), settings))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield Served(port, server, thread)
        finally:
            server.should_exit = True
            thread.join(30)

    return serve


@pytest.fixture(scope="package")
def served(serving: Serving) -> Iterator[Served]:
    """A server with the default limits."""
    with serving() as running:
        yield running


@pytest.fixture(scope="package")
def client(served: Served) -> Iterator[httpx.Client]:
    """An HTTP client of that server."""
    with httpx.Client(base_url=served.url, timeout=30, headers=AUTHORIZATION) as opened:
        yield opened
