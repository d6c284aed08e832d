"""Run the whole service on this machine: database, API and worker, until Ctrl-C.

    make run

Uses the profile `demo` unless ZIMAGE_PROFILE names another, and needs no API key unless API keys are configured or
other machines can reach it. Prints the addresses and an example request as soon as a worker is ready, however long it
loads. Logs are written to `log/` in the data folder. A worker that crashes is started again, however often, unless it
crashes six times in a row within ten minutes of its start: then, or if the API ends, everything is stopped.
"""

import contextlib
import http.client
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from zcore.checkpoint import requirements
from zcore.data_folder import UMASK
from zcore.errors import ConfigurationError
from zcore.foreign_text import printable
from zcore.keys import api_key_file
from zcore.settings import Settings, load_settings, setting_origins

ROOT = Path(__file__).resolve().parent.parent
MINIMUM_DISK_BYTES = 200 * 10**6
PROGRESS_INTERVAL_S = 10.0
RESTART_DELAYS_S = (1.0, 2.0, 5.0, 15.0, 60.0)
"""Delays before a crashed worker is started again; after one more crash in a row the service ends."""
STEADY_S = 600.0  # a crash after this time begins a new row
STOP_TIMEOUT_S = 20.0
CONFIGURATION_STATUS = 2  # of a process that a restart cannot help
LOG_LINES = 25
EXAMPLE = {"prompt": "a red circle on a white background", "seed": 42}


class StartupError(Exception):
    """The reason why the service cannot run, for the person who started it."""


@dataclass(frozen=True)
class Child:
    """A process of the service, and its log file."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    started_at: float

    def check(self) -> None:
        """Raise `StartupError` if the process has ended."""
        status = self.process.poll()
        if status is not None:
            raise StartupError(
                f"the {self.name} exited with status {status}; last lines of {self.log}:\n{_last_lines(self.log)}"
            )


def main() -> int:
    """Return the exit status: 0 after a signal, 1 if a process ended or could not start."""
    os.umask(UMASK)
    stop_signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: stop_signals.append(received))
    children: list[Child] = []
    try:
        run({"ZIMAGE_PROFILE": "demo", **os.environ}, children, stop_signals)
    except (StartupError, ConfigurationError) as error:
        print(f"run: {error}", file=sys.stderr)
        return 1
    finally:
        stop(children)
    return 0


def run(environment: dict[str, str], children: list[Child], stop_signals: list[int]) -> None:
    """Append the started processes to `children`, print the greeting, and return once a signal has arrived."""
    started_at = time.monotonic()
    environment = with_maintenance(with_keyless(environment))
    settings = load_settings(environment)
    check_port(settings.server.host, settings.server.port)
    check_disk(settings.data_path)
    check_model_and_gpu(settings)
    warn_of_missing_compiler(settings.pytorch.compile)
    logs = settings.data_path / "log"
    logs.mkdir(parents=True, exist_ok=True)
    migrate(environment, logs / "migrations.log")
    for name in ("server", "worker"):
        children.append(start(name, environment, logs))
    reported_at = started_at
    while not stop_signals and (missing := _missing(settings)) is not None:
        for child in children:
            child.check()
        if time.monotonic() - reported_at > PROGRESS_INTERVAL_S:
            reported_at = time.monotonic()
            print(_progress(missing, logs, reported_at - started_at), flush=True)
        time.sleep(0.1)
    if not stop_signals:
        print(_greeting(settings, logs, time.monotonic() - started_at), flush=True)
    supervise(children, environment, logs, stop_signals)


def with_keyless(environment: dict[str, str]) -> dict[str, str]:
    """Return the environment with `server.keyless` on, unless the settings choose, have API keys, or are not local."""
    settings = load_settings(environment)
    is_chosen = setting_origins(environment)["server.keyless"] != "default"
    if is_chosen or settings.server.api_keys or not settings.server.is_local:
        return environment
    return {**environment, "ZIMAGE_SERVER__KEYLESS": "true"}


def with_maintenance(environment: dict[str, str]) -> dict[str, str]:
    """Return the environment with `worker.maintenance` on, unless the settings choose: there is only this worker."""
    if setting_origins(environment)["worker.maintenance"] != "default":
        return environment
    return {**environment, "ZIMAGE_WORKER__MAINTENANCE": "true"}


def supervise(children: list[Child], environment: dict[str, str], logs: Path, stop_signals: list[int]) -> None:
    """Return once a signal has arrived; until then start the worker again when it crashes.

    Raises `StartupError` if the API ends, the worker crashes too often, or its settings are wrong.
    """
    crashes, restart_at = 0, None
    while not stop_signals:
        server, worker = children
        server.check()
        status = worker.process.poll()
        if status is not None and restart_at is None:
            crashes = 1 if time.monotonic() - worker.started_at > STEADY_S else crashes + 1
            if status == CONFIGURATION_STATUS:
                worker.check()
            if crashes > len(RESTART_DELAYS_S):
                raise StartupError(_crash_loop(crashes, worker, status))
            _kill_session(worker)
            delay_s = RESTART_DELAYS_S[crashes - 1]
            restart_at = time.monotonic() + delay_s
            print(f"run: the worker exited with status {status}; starting it again in {delay_s:g} s", file=sys.stderr)
        if restart_at is not None and time.monotonic() >= restart_at:
            children[1], restart_at = start("worker", environment, logs), None
            print(f"run: the log of the worker that ended is {logs / 'worker.previous.log'}", file=sys.stderr)
        time.sleep(0.1)


def _crash_loop(crashes: int, worker: Child, status: int) -> str:
    return (
        f"the worker ended {crashes} times in a row, each time within {STEADY_S / 60:g} minutes of its start, at last"
        f" with status {status}; the service gives up. Last lines of {worker.log}:\n{_last_lines(worker.log)}"
    )


def check_port(host: str, port: int) -> None:
    """Raise `StartupError` if the address is in use or is not an address of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartupError(
                f"port {port} of {host} is not available ({error.strerror}); "
                f"choose another one: ZIMAGE_SERVER__PORT={port + 1} make run"
            ) from None


def check_disk(folder: Path) -> None:
    """Raise `StartupError` if the disk is so full that the database could fail while running."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < MINIMUM_DISK_BYTES:
        raise StartupError(
            f"the disk of {folder} has {free_bytes / 1e6:.0f} MB free, but "
            f"{MINIMUM_DISK_BYTES / 1e6:.0f} MB are needed; free some space or choose another "
            "folder: ZIMAGE_DATA_DIR=/path make run"
        )


def check_model_and_gpu(settings: Settings) -> None:
    """Raise `StartupError` naming all that the worker would miss, instead of letting it find one after the other."""
    if found := requirements.missing(settings):
        reasons = "".join(f"\n  - {reason}" for reason in found)
        advice = "".join(f"\n  {way}" for way in requirements.ways_out(settings.profile))
        raise StartupError(f"the profile {settings.profile} cannot run here:{reasons}{advice}")


def warn_of_missing_compiler(compiles: bool) -> None:
    """Warn at startup about a problem that torch.compile would otherwise report only during the first image."""
    if compiles and not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")))):
        print(
            "run: pytorch.compile is on but there is no C++ compiler: install g++ or set ZIMAGE_PYTORCH__COMPILE=false",
            file=sys.stderr,
            flush=True,
        )


def migrate(environment: dict[str, str], log: Path) -> None:
    """Create the database or migrate it to the newest revision."""
    command = [sys.executable, "-m", "alembic", "upgrade", "head"]
    with log.open("wb") as output:
        status = subprocess.call(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    if status != 0:
        raise StartupError(f"the database could not be created or migrated; last lines of {log}:\n{_last_lines(log)}")


def start(name: str, environment: dict[str, str], logs: Path) -> Child:
    """Run a package as a process in a new session, so that Ctrl-C reaches only the launcher."""
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
    return Child(name, process, log, time.monotonic())


def stop(children: list[Child]) -> None:
    """Terminate all children, and kill those that do not stop in time together with their own children."""
    for child in children:
        child.process.terminate()
    deadline = time.monotonic() + STOP_TIMEOUT_S
    for child in children:
        try:
            child.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            print(f"run: the {child.name} did not stop within {STOP_TIMEOUT_S:.0f} s and was killed", file=sys.stderr)
        _kill_session(child)
    if children:
        print("run: stopped", flush=True)


def _kill_session(child: Child) -> None:
    try:
        os.killpg(child.process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    child.process.wait()


def _host(settings: Settings) -> str:
    """Return the host at which this machine reaches the API, without brackets."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.server.host, settings.server.host)


def _address(settings: Settings) -> str:
    host = _host(settings)
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.server.port}"


def _missing(settings: Settings) -> str | None:
    """Return the name of the process that is not ready: the `server`, or else the `worker`; None if both are."""
    # http.client, unlike urllib, asks no proxy of the environment.
    connection = http.client.HTTPConnection(_host(settings), settings.server.port, timeout=5)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/health/ready")
            workers = json.load(connection.getresponse())["workers"]
        except (OSError, http.client.HTTPException, ValueError):
            return "server"
    return None if workers > 0 else "worker"


def _progress(name: str, logs: Path, waited_s: float) -> str:
    """Describe what is being waited for, with the last line of its log (of a progress bar, its last state)."""
    does = {"server": "the server to start", "worker": "the worker, which loads the model"}[name]
    lines = [line for line in _read(logs / f"{name}.log").split("\n") if line.strip()]
    last = printable(lines[-1].rstrip().rpartition("\r")[2]) if lines else "its log is empty so far"
    return f"run: {waited_s:.0f} s: waiting for {does}: {last}"


def _greeting(settings: Settings, logs: Path, took_s: float) -> str:
    address = _address(settings)
    admin_key = "server.admin_key" if settings.server.admin_key else str(settings.data_path / "keys" / "admin")
    lines = [
        f"run: ready after {took_s:.1f} s, profile {settings.profile}",
        f"  API      {address}            docs: {address}/docs",
        f"  try it   {address}/playground",
        f"  admin    {address}/admin      key: {admin_key}",
        f"  logs     {logs}",
        f"  try      curl -s {address}/api/generate -H 'Content-Type: application/json' -H 'Prefer: wait=60' \\",
        *(f"             -H {header} \\" for header in _authorization(settings)),
        f"             -d '{json.dumps(EXAMPLE)}'",
        "  stop     Ctrl-C",
    ]
    return "\n".join(lines)


def _authorization(settings: Settings) -> list[str]:
    """Return the header with an API key for a shell, if one is needed: the generated key's file, or a placeholder."""
    file = api_key_file(settings)
    if file is not None:
        return [f'"Authorization: Bearer $(cat {shlex.quote(str(file))})"']
    return ["'Authorization: Bearer KEY'"] if settings.server.api_keys else []


def _last_lines(log: Path) -> str:
    return "\n".join(f"  {printable(line)}" for line in _read(log).splitlines()[-LOG_LINES:])


def _read(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
