"""Run the whole service on this machine: database, API and worker, until Ctrl-C.

    make run

Takes the settings (profile `demo` unless ZIMAGE_PROFILE names another); gives an API that answers, and the lines to
try it with. Logs go to `log/` in the data folder. Everything ends together: a child that dies by itself ends the
others. Does not know what the children do.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from zcore.errors import ConfigurationError
from zcore.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parent.parent
SMALLEST_DISK_BYTES = 200 * 10**6
READY_WITHIN_S = 180.0
STOPPED_WITHIN_S = 20.0
LAST_LINES = 25
EXAMPLE = {"prompt": "a red circle on a white background", "seed": 42}


class Refusal(Exception):
    """Why the service cannot run: a few lines for the person who started it."""


@dataclass(frozen=True)
class Child:
    """One of the processes of the service, and where it logs."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def check(self) -> None:
        """Refuse to go on when it has ended."""
        status = self.process.poll()
        if status is not None:
            raise Refusal(
                f"the {self.name} ended with status {status}; the end of {self.log}:\n{_last_lines(self.log)}"
            )


def main() -> int:
    """The exit status: 0 when asked to stop, 1 when something stopped by itself or could not start."""
    asked_to_stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: asked_to_stop.append(received))
    children: list[Child] = []
    try:
        run({"ZIMAGE_PROFILE": "demo", **os.environ}, children, asked_to_stop)
    except (Refusal, ConfigurationError) as refusal:
        print(f"run: {refusal}", file=sys.stderr)
        return 1
    finally:
        stop(children)
    return 0


def run(environment: dict[str, str], children: list[Child], asked_to_stop: list[int]) -> None:
    """Start everything into `children`, say so, and return when `asked_to_stop` is no longer empty."""
    begun_at = time.monotonic()
    settings = load_settings(environment)
    check_port(settings.server.host, settings.server.port)
    check_disk(settings.data_path)
    warn_of_missing_compiler(settings.pytorch.compile)
    logs = settings.data_path / "log"
    logs.mkdir(parents=True, exist_ok=True)
    migrate(environment, logs / "migrations.log")
    for name in ("server", "worker"):
        children.append(start(name, environment, logs))
    while not asked_to_stop and not _is_ready(_address(settings)):
        _look_after(children)
        if time.monotonic() - begun_at > READY_WITHIN_S:
            raise Refusal(f"server and worker were not ready within {READY_WITHIN_S:.0f} s; their logs are in {logs}")
    if not asked_to_stop:
        print(_greeting(settings, logs, time.monotonic() - begun_at), flush=True)
    while not asked_to_stop:
        _look_after(children)


def check_port(host: str, port: int) -> None:
    """Refuse an address that another program holds, or that is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise Refusal(
                f"port {port} of {host} cannot be had ({error.strerror}); "
                f"choose another: ZIMAGE_SERVER__PORT={port + 1} make run"
            ) from None


def check_disk(folder: Path) -> None:
    """Refuse a disk on which the database would break in the middle."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < SMALLEST_DISK_BYTES:
        raise Refusal(
            f"the disk of {folder} has {free_bytes / 1e6:.0f} MB free, at least {SMALLEST_DISK_BYTES / 1e6:.0f} MB are "
            "needed; free some, or choose another folder: ZIMAGE_DATA_DIR=/path make run"
        )


def warn_of_missing_compiler(compiles: bool) -> None:
    """Say before the first picture what torch.compile would only say in the middle of it."""
    if compiles and not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")))):
        print(
            "run: pytorch.compile is on, but no C++ compiler is here: install g++ or set ZIMAGE_PYTORCH__COMPILE=false",
            file=sys.stderr,
            flush=True,
        )


def migrate(environment: dict[str, str], log: Path) -> None:
    """Bring the database to the newest revision, or make it."""
    command = [sys.executable, "-m", "alembic", "upgrade", "head"]
    with log.open("wb") as output:
        status = subprocess.call(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    if status != 0:
        raise Refusal(f"the database could not be made ready; the end of {log}:\n{_last_lines(log)}")


def start(name: str, environment: dict[str, str], logs: Path) -> Child:
    """Start a package as a process, in a session of its own so that Ctrl-C reaches the launcher alone."""
    log = logs / f"{name}.log"
    if log.exists():
        log.replace(logs / f"{name}.previous.log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", name],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Child(name, process, log)


def stop(children: list[Child]) -> None:
    """End all together: politely, and those that do not listen with all their own children."""
    for child in children:
        child.process.terminate()
    deadline = time.monotonic() + STOPPED_WITHIN_S
    for child in children:
        try:
            child.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            print(f"run: the {child.name} did not stop within {STOPPED_WITHIN_S:.0f} s and was killed", file=sys.stderr)
        _kill_session(child)
    if children:
        print("run: stopped", flush=True)


def _kill_session(child: Child) -> None:
    try:
        os.killpg(child.process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    child.process.wait()


def _look_after(children: list[Child]) -> None:
    for child in children:
        child.check()
    time.sleep(0.1)


def _address(settings: Settings) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.server.host, settings.server.host)
    return f"http://{host}:{settings.server.port}"


def _is_ready(address: str) -> bool:
    """Whether jobs are accepted and somebody is there to work on them."""
    try:
        with urllib.request.urlopen(f"{address}/health/ready", timeout=5) as answer:
            return json.load(answer)["workers"] > 0
    except OSError:
        return False


def _greeting(settings: Settings, logs: Path, took_s: float) -> str:
    address = _address(settings)
    key = "the one you configured" if settings.server.admin_key else f"in {settings.data_path / 'keys' / 'admin'}"
    return f"""\
run: ready after {took_s:.1f} s, profile {settings.profile}
  API      {address}            described by {address}/schema/openapi.json
  admin    {address}/admin      its key is {key}
  logs     {logs}
  try      curl -s {address}/api/generate -H 'Content-Type: application/json' -H 'Prefer: wait=60' \\
             -d '{json.dumps(EXAMPLE)}'
  stop     Ctrl-C"""


def _last_lines(log: Path) -> str:
    return "\n".join(f"  {line}" for line in log.read_text(errors="replace").splitlines()[-LAST_LINES:])


if __name__ == "__main__":
    sys.exit(main())
