"""An installation of the product for tests: its settings by dotted name, its database, and its processes with logs."""

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from tests.services import process
from tests.services.process import Running
from tests.waiting import wait_until
from zcore.jobs.database import Database
from zcore.settings import Settings, load_settings

TREE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Server:
    """A `python -m server` process that answers requests."""

    url: str
    running: Running


@dataclass(frozen=True)
class Installation:
    """One data folder and one database, with the demo profile and the settings in `given`.

    Keyless unless these contain API keys, and with maintenance in its workers unless these say otherwise.
    """

    folder: Path
    given: dict[str, Any]
    prefix: Sequence[str] = ()
    """What comes before the command of each of its processes."""
    tree: Path = TREE
    """The code that they run."""

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of its processes."""
        chosen = {"profile": "demo", "data_dir": str(self.folder), "log.format": "json", **self.given}
        chosen.setdefault("server.keyless", "server.api_keys" not in chosen)
        chosen.setdefault("worker.maintenance", True)
        names = {f"ZIMAGE_{name.upper().replace('.', '__')}": _text(value) for name, value in chosen.items()}
        return {**os.environ, "OMP_NUM_THREADS": "1", **names}

    @property
    def settings(self) -> Settings:
        """Settings that its processes load."""
        return load_settings({name: text for name, text in self.environment.items() if name.startswith("ZIMAGE_")})

    def changed(self, **settings: Any) -> "Installation":
        """Return this installation with other settings; `server__port=1` sets `server.port`."""
        other = {name.replace("__", "."): value for name, value in settings.items()}
        return replace(self, given={**self.given, **other})

    @contextmanager
    def database(self) -> Iterator[Database]:
        """Open its database in this process."""
        with closing(Database(self.settings.database_url)) as opened:
            yield opened

    def start(self, package: str, name: str = "", *arguments: str) -> Running:
        """Start `python -m package`, with its log in the data folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / f"{name or package}.log"
        command = [*self.prefix, sys.executable, "-m", package, *arguments]
        return process.start(command, log, environment=self.environment, folder=self.tree)

    @contextmanager
    def serving(self) -> Iterator[Server]:
        """Run its API server, and enter the block when it answers."""
        port = process.free_port()
        running = self.changed(server__port=port).start("server", f"server-{port}")
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until(lambda: answers(url, running), timeout_s=60)
            yield Server(url, running)
        finally:
            running.stop(signal.SIGTERM)

    @contextmanager
    def working(self, *arguments: str, package: str = "worker", name: str = "") -> Iterator[Running]:
        """Run a worker (or another package) during the block, without waiting until it is ready."""
        running = self.start(package, name, *arguments)
        try:
            yield running
        finally:
            running.stop(signal.SIGKILL)


def answers(url: str, running: Running) -> bool:
    """Return whether the API answers. Raises with the end of its log if the process has ended."""
    running.check()
    try:
        return httpx.get(f"{url}/health/live", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def events(running: Running) -> list[dict[str, Any]]:
    """Return the structured lines of a process's log so far."""
    lines = running.log.read_text(errors="replace").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def has_logged(running: Running, event: str) -> bool:
    """Return whether the process has logged this event. Raises with the end of its log if the process has ended."""
    if any(line.get("event") == event for line in events(running)):
        return True
    running.check()
    return False


def _text(value: Any) -> str:
    """Return a value as an environment variable; anything but text is written as TOML."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {json.dumps(entry)}" for key, entry in value.items()) + " }"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(json.dumps(entry) for entry in value) + "]"
    return json.dumps(value)
