"""Stopping the API: it serves on until load balancers have noticed, whichever way it was started."""

import http.client
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from tests.integration.installation import TREE, Installation, answers
from tests.services import process
from tests.services.process import Running, free_port
from tests.waiting import wait_until

STARTS = {
    "python -m server": ["server"],
    "plain uvicorn": ["uvicorn", "--factory", "server.asgi:make", "--log-level=warning", "--port={port}"],
}
LOOK_EVERY_S = 0.1
CLIENTS = 4


class Balancer:
    """A TCP load balancer: gives every connection to a backend whose `/health/ready` answered 200 when last asked."""

    def __init__(self, backends: list[int]) -> None:
        self.ready: set[int] = set()
        self.open: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._backends = backends
        self._given = 0
        self._is_closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        for work in (self._look, self._accept):
            threading.Thread(target=work, daemon=True).start()

    def close(self) -> None:
        """Accept no more connections."""
        self._is_closing.set()
        self._listener.close()

    def _look(self) -> None:
        while not self._is_closing.wait(LOOK_EVERY_S):
            for port in self._backends:
                try:
                    is_ready = _status(port, "/health/ready") == 200
                except (OSError, http.client.HTTPException):
                    is_ready = False
                with self._lock:
                    (self.ready.add if is_ready else self.ready.discard)(port)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with self._lock:
            self._given += 1
            ready = sorted(self.ready)
            port = ready[self._given % len(ready)] if ready else 0  # without any, the client is disconnected
            self.open[port] += 1
        with client, suppress(OSError), socket.create_connection(("127.0.0.1", port)) as api:
            back = threading.Thread(target=_copy, args=(api, client), daemon=True)
            back.start()
            _copy(client, api)
            back.join()
        with self._lock:
            self.open[port] -= 1


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@contextmanager
def started(installation: Installation, arguments: list[str], port: int) -> Generator[Running]:
    """Run an API on this port, and enter the block when it answers."""
    installation.folder.mkdir(exist_ok=True)
    environment = installation.changed(server__port=port).environment
    command = [sys.executable, "-m", *(argument.format(port=port) for argument in arguments)]
    running = process.start(command, installation.folder / f"{port}.log", environment=environment, folder=TREE)
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}", running), timeout_s=120)
        yield running
    finally:
        running.stop(signal.SIGKILL)


@pytest.mark.parametrize("arguments", STARTS.values(), ids=STARTS)
def test_after_sigterm_an_api_is_not_ready_but_serves_until_a_second_signal(
    tmp_path: Path, sqlite_url: str, arguments: list[str]
) -> None:
    installation = Installation(tmp_path / "data", {"database.url": sqlite_url, "server.drain_s": 600})
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with started(installation, arguments, port) as running, ThreadPoolExecutor(1) as pool, httpx.Client() as client:
        assert "connection" not in client.get(f"{url}/health/live").headers
        waiting = pool.submit(
            httpx.post, f"{url}/api/generate", json={"prompt": "x"}, headers={"prefer": "wait=60"}, timeout=90
        )
        wait_until(lambda: httpx.get(f"{url}/api/jobs").json()["jobs"])
        running.send(signal.SIGTERM)
        wait_until(lambda: _status(port, "/health/ready") == 503)
        ready = httpx.get(f"{url}/health/ready")
        assert ready.json() == {"status": "draining", "database": True, "workers": 0}
        assert (waiting.result(90).status_code, waiting.result().json()["status"]) == (202, "queued")
        for sender in (client, httpx):
            answer = sender.get(f"{url}/api/jobs")
            assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        running.send(signal.SIGTERM)
        running.process.wait(60)


def test_the_drain_ends_by_itself(tmp_path: Path, sqlite_url: str) -> None:
    installation = Installation(tmp_path / "data", {"database.url": sqlite_url, "server.drain_s": 0.5})
    with started(installation, STARTS["python -m server"], free_port()) as running:
        running.send(signal.SIGTERM)
        running.process.wait(60)


def test_a_rolling_restart_behind_a_load_balancer_fails_no_request(tmp_path: Path, sqlite_url: str) -> None:
    """The drain lasts until the balancer has noticed, however slow this machine is: then a second signal ends it."""
    installation = Installation(tmp_path / "data", {"database.url": sqlite_url, "server.drain_s": 600})
    ports = [free_port(), free_port()]
    is_over = threading.Event()

    def send_requests(port: int) -> tuple[int, list[str]]:
        count, failures = 0, list[str]()
        while not is_over.is_set():
            count += 1
            try:
                assert _status(port, "/health/live") == 200
            except (OSError, http.client.HTTPException) as fault:
                failures.append(repr(fault))
        return count, failures

    def replace(running: Running, port: int) -> None:
        running.send(signal.SIGTERM)
        wait_until(lambda: port not in balancer.ready and balancer.open[port] == 0, timeout_s=60)
        running.send(signal.SIGTERM)
        running.process.wait(60)

    with (
        started(installation, STARTS["plain uvicorn"], ports[1]) as second,
        closing(Balancer(ports)) as balancer,
        started(installation, STARTS["python -m server"], ports[0]) as first,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        wait_until(lambda: balancer.ready == set(ports), timeout_s=60)
        clients = [pool.submit(send_requests, balancer.port) for _ in range(CLIENTS)]
        try:
            replace(first, ports[0])
            with started(installation, STARTS["python -m server"], ports[0]):
                wait_until(lambda: balancer.ready == set(ports), timeout_s=60)
                replace(second, ports[1])
                is_over.set()
                results = [client.result(90) for client in clients]
        finally:
            is_over.set()
    assert [failure for _, failures in results for failure in failures] == []
    assert all(count > 1 for count, _ in results)


def _status(port: int, path: str) -> int:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        return answer.status
