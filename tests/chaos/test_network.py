"""The links of a chaos run do to a connection what they say."""

import socket
import threading
from collections.abc import Generator
from contextlib import closing

import httpx
import pytest

from tests.chaos.network import NORMAL, Behavior, Link, Loop, http_answer, looping
from tests.services.process import free_port

TIMEOUT_S = 10.0


@pytest.fixture
def loop() -> Generator[Loop]:
    with looping() as running:
        yield running


@pytest.fixture
def echo() -> Generator[int]:
    """The port of a server that sends back what it receives."""
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=_accept, args=(listener,))
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def _accept(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_echo, args=(connection,), daemon=True).start()


def _echo(connection: socket.socket) -> None:
    with connection:
        while chunk := connection.recv(1024):
            connection.sendall(chunk)


def connect(link: Link) -> socket.socket:
    return socket.create_connection(("127.0.0.1", link.port), timeout=TIMEOUT_S)


def exchange(connection: socket.socket, sent: bytes) -> bytes:
    """Send bytes and return what comes back; nothing if the connection ends."""
    try:
        connection.sendall(sent)
        return connection.recv(1024)
    except ConnectionError:
        return b""


def test_a_link_passes_everything_on(loop: Loop, echo: int) -> None:
    with closing(connect(Link(loop, echo))) as connection:
        assert exchange(connection, b"one") == b"one"
        assert exchange(connection, b"two") == b"two"


def test_a_link_with_several_targets_takes_one_that_accepts(loop: Loop, echo: int) -> None:
    link = Link(loop, free_port(), echo)
    for _ in range(3):
        with closing(connect(link)) as connection:
            assert exchange(connection, b"one") == b"one"


def test_a_refusing_link_ends_connections_and_refuses_new_ones(loop: Loop, echo: int) -> None:
    link = Link(loop, echo)
    with closing(connect(link)) as connection:
        link.behave(Behavior(refuses=True))
        assert exchange(connection, b"one") == b""
    with pytest.raises(ConnectionRefusedError):
        connect(link)
    link.behave(NORMAL)
    with closing(connect(link)) as connection:
        assert exchange(connection, b"one") == b"one"


def test_a_frozen_link_delivers_later(loop: Loop, echo: int) -> None:
    link = Link(loop, echo)
    with closing(connect(link)) as connection:
        link.behave(Behavior(frozen=True))
        connection.sendall(b"one")
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1024)
        link.behave(NORMAL)
        connection.settimeout(TIMEOUT_S)
        assert connection.recv(1024) == b"one"


def test_a_cut_link_ends_connections_and_accepts_new_ones(loop: Loop, echo: int) -> None:
    link = Link(loop, echo)
    with closing(connect(link)) as connection:
        assert exchange(connection, b"one") == b"one"
        link.cut()
        assert exchange(connection, b"two") == b""
    with closing(connect(link)) as connection:
        assert exchange(connection, b"one") == b"one"


def test_a_half_closed_link_ends_only_the_direction_from_the_service(loop: Loop, echo: int) -> None:
    link = Link(loop, echo)
    with closing(connect(link)) as connection:
        assert exchange(connection, b"one") == b"one"
        link.half_close()
        assert connection.recv(1024) == b""
        connection.sendall(b"two")


def test_a_lost_answer_ends_the_connection_after_the_service_has_answered(loop: Loop, echo: int) -> None:
    link = Link(loop, echo)
    with closing(connect(link)) as connection:
        link.behave(Behavior(loses_answers_to=b"COMMIT"))
        assert exchange(connection, b"SELECT") == b"SELECT"
        assert exchange(connection, b"COMMIT") == b""
    assert link.lost_answers == 1


def test_a_link_can_answer_in_place_of_the_service(loop: Loop, echo: int) -> None:
    link = Link(loop, echo)
    link.behave(Behavior(answers=http_answer(503, "Slow Down", b"later")))
    answer = httpx.put(f"http://127.0.0.1:{link.port}/", content=b"x" * 100_000, timeout=TIMEOUT_S)
    assert (answer.status_code, answer.content) == (503, b"later")
