"""Clients that stall, drip or come in numbers are disconnected, and hold no memory meanwhile."""

import json
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.connections import ANSWERED_ABOVE_LIMIT
from tests.integration.edge.conftest import KEY, Reply, Served, Serving, read_reply
from tests.waiting import wait_until

HEAD = f"POST /api/inputs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: image/png\r\n".encode()
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def impatient(serving: Serving) -> Iterator[Served]:
    """A server that waits half a second for heads and bodies, and serves three connections."""
    given = {"head_timeout_s": 0.5, "body_timeout_s": 0.5, "min_body_bytes_per_s": 1000, "max_connections": 3}
    with serving(**{f"server__{name}": value for name, value in given.items()}) as running:
        running.server.config.timeout_keep_alive = 1
        yield running
        wait_until(lambda: not running.server.server_state.connections)


def is_closed(connection: socket.socket) -> bool:
    """Return whether the server has closed the connection, without a byte; waits for either."""
    return connection.recv(1) == b""


def check_problem(reply: Reply, status: int, code: str) -> None:
    document = json.loads(reply.body)
    assert (reply.status, document["status"], document["code"]) == (status, status, code)
    assert reply.headers["connection"] == "close"


def test_a_connection_without_a_request_is_closed(impatient: Served) -> None:
    with impatient.connection() as connection:
        assert is_closed(connection)


@pytest.mark.parametrize(
    "sent", [b"G", b"GET /health/live HT", b"GET / HTTP/1.1\r\nHost: x\r\nX: ", b"GET / HTTP/1.1\r\n"]
)
def test_an_unfinished_head_is_answered_with_408(impatient: Served, sent: bytes) -> None:
    with impatient.connection() as connection:
        connection.sendall(sent)
        check_problem(read_reply(connection), 408, "request_timeout")
        assert is_closed(connection)


def test_a_dripping_head_is_answered_with_408(impatient: Served) -> None:
    """Each byte resets a limit on idleness, but not a deadline."""
    with impatient.connection() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX: ")
        connection.settimeout(0.05)
        received = b""
        for _ in range(1000):
            try:
                connection.sendall(b"x")
                received += connection.recv(65536)
                break
            except TimeoutError:
                continue
        assert received.startswith(b"HTTP/1.1 408 ")


def test_a_second_request_on_a_connection_has_a_deadline_too(impatient: Served) -> None:
    with impatient.connection() as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_reply(connection).status == 200
        connection.sendall(b"GET /health/live HT")
        check_problem(read_reply(connection), 408, "request_timeout")


@pytest.mark.parametrize("declared", [b"Content-Length: 1000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"])
def test_half_a_body_is_answered_with_408(impatient: Served, declared: bytes) -> None:
    with impatient.connection() as connection:
        connection.sendall(HEAD + declared)
        connection.sendall(b"186a0\r\n" + b"x" * 100_000)
        check_problem(read_reply(connection), 408, "request_timeout")
        assert is_closed(connection)


def test_a_body_that_keeps_coming_has_as_much_time_as_it_needs(impatient: Served) -> None:
    """Several periods of the timeout, each with more than the least number of bytes."""
    with impatient.connection() as connection:
        connection.sendall(HEAD + b"Content-Length: 8000\r\n\r\n")
        connection.settimeout(0.1)
        for _ in range(8):
            with pytest.raises(TimeoutError):  # no answer yet
                connection.recv(1)
            connection.sendall(b"x" * 1000)
        connection.settimeout(20)
        assert read_reply(connection).status == 400, "it is not an image"


def test_an_endless_head_is_refused(served: Served) -> None:
    with served.connection() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * 200_000)
        check_problem(read_reply(connection), 431, "headers_too_large")


def test_the_rest_of_a_body_that_was_not_read_does_not_keep_the_connection(serving: Serving) -> None:
    with serving(server__head_timeout_s=0.2) as running, running.connection() as connection:
        running.server.config.timeout_keep_alive = 0
        connection.sendall(b"POST /api/inputs HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nx")
        assert read_reply(connection).status == 401
        assert is_closed(connection)


def test_beyond_the_limit_requests_are_refused_and_the_health_check_is_not(impatient: Served) -> None:
    opened = [socket.create_connection(("127.0.0.1", impatient.port)) for _ in range(3)]
    try:
        wait_until(lambda: len(impatient.server.server_state.connections) == 3)
        with impatient.connection() as connection:
            connection.sendall(b"GET /api/jobs HTTP/1.1\r\nHost: x\r\n\r\n")
            reply = read_reply(connection)
            check_problem(reply, 503, "overloaded")
            assert int(reply.headers["retry-after"]) > 0
        assert httpx.get(f"{impatient.url}/health/live").status_code == 200
    finally:
        for connection in opened:
            connection.close()


def test_far_beyond_the_limit_connections_are_closed_at_once(serving: Serving) -> None:
    with serving(server__max_connections=1) as running:
        opened = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(1 + ANSWERED_ABOVE_LIMIT)]
        try:
            wait_until(lambda: len(running.server.server_state.connections) == len(opened))
            with running.connection() as connection:
                assert is_closed(connection)
        finally:
            for connection in opened:
                connection.close()


def test_stalled_uploads_wait_on_disk(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 stalled uploads of 20 MiB used to hold 400 MiB of the server's memory."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = resident_bytes()
    opened = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(20)]
    try:
        for connection in opened:
            connection.sendall(HEAD + f"Content-Length: {21 * MIB}\r\n\r\n".encode())
            connection.sendall(bytes(20 * MIB))
        wait_until(lambda: spooled_bytes(tmp_path) >= 20 * 19 * MIB, timeout_s=120)
        assert resident_bytes() - before < 100 * MIB
    finally:
        for connection in opened:
            connection.close()
    wait_until(lambda: spooled_bytes(tmp_path) == 0)


def resident_bytes() -> int:
    """Return the memory of this process, in which the server runs."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def spooled_bytes(folder: Path) -> int:
    """Return the size of the deleted files in this folder that this process has open."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if str(entry.readlink()).startswith(f"{folder}/"):
                total += entry.stat().st_size
        except FileNotFoundError:
            continue
    return total
