"""An installation as an operator runs it: real API and worker processes over PostgreSQL, Redis and S3.

Takes the addresses of the services; gives processes that can be started, stopped and killed. Knows nothing of jobs.
"""

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.services import process
from tests.services.process import Running
from tests.services.s3 import Bucket
from tests.waiting import wait_until

TREE = Path(__file__).resolve().parents[2]
WEBHOOK_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
STARTED_WITHIN_S = 120.0


@dataclass
class Installation:
    """One profile `demo` over given services. Everything started here is stopped by `stop`."""

    folder: Path
    environment: Mapping[str, str]
    port: int
    started: list[Running] = field(default_factory=list[Running])

    @classmethod
    def over(
        cls, folder: Path, database_url: str, redis_url: str, bucket: Bucket, settings: Mapping[str, str]
    ) -> "Installation":
        """`settings` are further ZIMAGE_ variables."""
        port = process.free_port()
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("ZIMAGE_")},
            "ZIMAGE_PROFILE": "demo",
            "ZIMAGE_DATA_DIR": str(folder),
            "ZIMAGE_DATABASE__URL": database_url,
            "ZIMAGE_BROKER__URL": redis_url,
            "ZIMAGE_STORAGE__BUCKET": bucket.name,
            "ZIMAGE_STORAGE__ENDPOINT_URL": bucket.endpoint_url,
            "ZIMAGE_STORAGE__ACCESS_KEY_ID": bucket.access_key_id,
            "ZIMAGE_STORAGE__SECRET_ACCESS_KEY": bucket.secret_access_key,
            "ZIMAGE_WEBHOOKS__SECRET": WEBHOOK_SECRET,
            "ZIMAGE_SERVER__PORT": str(port),
            "OMP_NUM_THREADS": "1",  # two workers share two cores
            **settings,
        }
        return cls(folder, environment, port)

    @property
    def url(self) -> str:
        """Where the API answers."""
        return f"http://127.0.0.1:{self.port}"

    def start_server(self) -> Running:
        """The API, answering."""
        server = self._start("server")

        def is_ready() -> bool:
            server.check()
            return self._ready() is not None

        wait_until(is_ready, STARTED_WITHIN_S)
        return server

    def start_workers(self, count: int) -> list[Running]:
        """Workers, all of them on the list of those present."""
        before = (self._ready() or {"workers": 0})["workers"]
        workers = [self._start("worker") for _ in range(count)]

        def are_present() -> bool:
            for worker in workers:
                worker.check()
            return (self._ready() or {"workers": 0})["workers"] == before + count

        wait_until(are_present, STARTED_WITHIN_S)
        return workers

    def stop(self) -> None:
        """Ends what still runs, politely."""
        for running in self.started:
            running.send(signal.SIGTERM)
        for running in self.started:
            running.stop()

    def _start(self, package: str) -> Running:
        log = self.folder / f"{package}-{len(self.started)}.log"
        running = process.start([sys.executable, "-m", package], log, environment=self.environment, folder=TREE)
        self.started.append(running)
        return running

    def _ready(self) -> dict[str, int] | None:
        try:
            answer = httpx.get(f"{self.url}/health/ready", timeout=5)
        except httpx.TransportError:
            return None
        return answer.json() if answer.status_code == 200 else None
