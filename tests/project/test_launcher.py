"""The commands of the Makefile: errors are one line, and the processes they start end with them."""

import ast
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from tests.services.process import free_port
from tests.waiting import wait_until
from zcore.settings import load_settings

TREE = Path(__file__).resolve().parents[2]
NO_SPACE = "import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)"
OLD_PYTHON = "import sys; sys.version_info = (3, 9, 2, 'final', 0)"
NO_VENV = "import sys; sys.modules['venv'] = None"
NO_ENSUREPIP_AND_NO_NETWORK = """
import importlib.util, urllib.request, urllib.error
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "ensurepip" else find_spec(name, *rest)
def refuse(*_, **__):
    raise urllib.error.URLError("no network")
urllib.request.urlopen = refuse
"""


@pytest.fixture
def copied_tree(tmp_path: Path) -> Path:
    """The files that `make environment` needs, in a folder without an installation."""
    for name in ("pyproject.toml", "config/requirements.lock", "bin/environment.py"):
        target = tmp_path / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TREE / name, target)
    return tmp_path / "tree"


def test_an_old_python_is_rejected_in_one_line(copied_tree: Path, tmp_path: Path) -> None:
    failed = _environment(copied_tree, tmp_path, OLD_PYTHON)
    assert failed.returncode == 1
    assert failed.stderr == (
        "environment: Python 3.9 is too old, 3.11 or newer is needed; select one: make PYTHON=/path/to/python3 ...\n"
    )


def test_an_old_python_can_parse_the_file_that_rejects_it() -> None:
    ast.parse((TREE / "bin" / "environment.py").read_text(), feature_version=(3, 6))


def test_a_full_disk_is_reported_in_one_line_before_anything_is_installed(copied_tree: Path, tmp_path: Path) -> None:
    failed = _environment(copied_tree, tmp_path, NO_SPACE)
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"environment: the disk of {copied_tree} has 0.0 GB free")
    assert failed.stderr.count("\n") == 1
    assert not (copied_tree / ".venv").exists()


@pytest.mark.parametrize("fake", [NO_VENV, NO_ENSUREPIP_AND_NO_NETWORK], ids=["no venv", "no ensurepip, no network"])
def test_a_python_without_venv_is_rejected_in_one_line(copied_tree: Path, tmp_path: Path, fake: str) -> None:
    failed = _environment(copied_tree, tmp_path, fake)
    assert failed.returncode == 1
    assert failed.stderr == (
        "environment: this Python cannot make virtual environments; on Debian: apt-get install python3-venv\n"
    )


def test_an_up_to_date_environment_is_not_touched() -> None:
    command = [sys.executable, TREE / "bin" / "environment.py", "run"]
    subprocess.run(command, capture_output=True, check=True)
    again = subprocess.run(command, capture_output=True, text=True)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


def test_a_port_in_use_is_reported_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        failed = _run(tmp_path, {"ZIMAGE_SERVER__PORT": str(port)})
    assert failed.returncode == 1
    assert failed.stderr.startswith(
        f"run: port {port} of 127.0.0.1 is not available (Address already in use); choose another one:"
    )
    assert failed.stderr.count("\n") == 1


def test_a_full_disk_is_reported_in_one_line_before_the_database_is_created(tmp_path: Path) -> None:
    failed = _run(tmp_path, _with_fake(tmp_path, NO_SPACE))
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"run: the disk of {tmp_path / 'data'} has 0 MB free")
    assert failed.stderr.count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_an_invalid_setting_is_reported_in_one_line(tmp_path: Path) -> None:
    failed = _run(tmp_path, {"ZIMAGE_SERVER__PROT": "1"})
    assert failed.returncode == 1
    assert failed.stderr.startswith("run: environment variable ZIMAGE_SERVER__PROT is not a setting; did you mean")
    assert failed.stderr.count("\n") == 1


def test_a_missing_compiler_is_reported_before_the_start(tmp_path: Path) -> None:
    stopped_early = {"ZIMAGE_PYTORCH__COMPILE": "true", "ZIMAGE_DATABASE__URL": "mysql://nowhere"}
    without = _run(tmp_path, {**stopped_early, "PATH": str(tmp_path), "CXX": ""})
    with_one = _run(tmp_path, {**stopped_early, "PATH": str(tmp_path), "CXX": sys.executable})
    warning = (
        "run: pytorch.compile is on but there is no C++ compiler: install g++ or set ZIMAGE_PYTORCH__COMPILE=false"
    )
    assert without.stderr.splitlines()[0] == warning
    assert warning not in with_one.stderr


def test_a_failed_migration_is_reported_with_its_log(tmp_path: Path) -> None:
    failed = _run(tmp_path, {"ZIMAGE_DATABASE__URL": "mysql://nowhere"})
    assert failed.returncode == 1
    assert "run: the database could not be created or migrated" in failed.stderr
    assert "database.url: must be a sqlite or postgresql URL, not mysql" in failed.stderr


@pytest.mark.acceptance
def test_the_service_generates_an_image_and_leaves_no_process_behind(tmp_path: Path) -> None:
    with _service(tmp_path) as (launcher, address):
        body = {"prompt": "a red circle on a white background", "seed": 42, "steps": 2, "width": 64, "height": 64}
        response = httpx.post(f"{address}/api/generate", json=body, headers={"Prefer": "wait=60"}, timeout=90)
        assert response.json()["status"] == "succeeded", response.text
        processes = _children(launcher.pid)
        assert len(processes) >= 2
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(30) == 0
    assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()]
    with _service(tmp_path) as (_, address):
        jobs = httpx.get(f"{address}/api/jobs", timeout=30).json()
        assert response.json()["id"] in str(jobs)


@pytest.mark.acceptance
def test_a_crashed_worker_is_started_again_and_the_death_of_the_server_ends_the_service(tmp_path: Path) -> None:
    """With a proxy in the environment that does not answer, which no part of the service may ask about this machine."""
    with _service(tmp_path, http_proxy="http://127.0.0.1:9", all_proxy="http://127.0.0.1:9") as (launcher, address):
        worker = _process(launcher, "worker")
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: _process(launcher, "worker") not in (None, worker), timeout_s=60)
        assert httpx.get(f"{address}/health/live", trust_env=False).status_code == 200
        processes = _children(launcher.pid)
        os.kill(_process(launcher, "server") or 0, signal.SIGKILL)
        assert launcher.wait(60) == 1
        assert launcher.stderr is not None
        reported = launcher.stderr.read()
        assert "run: the worker exited with status -9; starting it again in 1 s" in reported
        assert "run: the server exited with status -9" in reported
    assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize(("code", "status"), [("import os; os.abort()", -6), ("raise SystemExit(0)", 0)])
def test_a_worker_that_ends_again_and_again_ends_the_service(
    launcher: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: str,
    status: int,
) -> None:
    monkeypatch.setattr(launcher, "RESTART_DELAYS_S", (0.0, 0.0))
    monkeypatch.setattr(launcher, "start", lambda name, _environment, logs: _ended(launcher, name, logs, code))
    server = _ended(launcher, "server", tmp_path, "input()", stdin=subprocess.PIPE)
    children = [server, launcher.start("worker", {}, tmp_path)]
    with pytest.raises(launcher.StartupError, match=rf"ended 3 times in a row, .* with status {status}; .*gives up"):
        launcher.supervise(children, {}, tmp_path, [])
    assert capsys.readouterr().err.count("starting it again") == 2
    server.process.communicate()


def test_crashes_that_lie_far_apart_do_not_end_the_service(
    launcher: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_signals: list[int] = []
    started = 0

    def start(name: str, _environment: dict[str, str], logs: Path) -> Any:
        nonlocal started
        started += 1
        if started == 10:
            stop_signals.append(signal.SIGTERM)
        ended = _ended(launcher, name, logs, "import os; os.abort()")
        return replace(ended, started_at=ended.started_at - launcher.STEADY_S)

    monkeypatch.setattr(launcher, "RESTART_DELAYS_S", (0.0, 0.0))
    monkeypatch.setattr(launcher, "start", start)
    server = _ended(launcher, "server", tmp_path, "input()", stdin=subprocess.PIPE)
    children = [server, start("worker", {}, tmp_path)]
    launcher.supervise(children, {}, tmp_path, stop_signals)
    children[1].process.wait()
    assert capsys.readouterr().err.count("starting it again") == 9
    server.process.communicate()


def test_a_worker_with_wrong_settings_is_not_started_again(launcher: ModuleType, tmp_path: Path) -> None:
    server = _ended(launcher, "server", tmp_path, "input()", stdin=subprocess.PIPE)
    worker = _ended(launcher, "worker", tmp_path, "raise SystemExit(2)")
    with pytest.raises(launcher.StartupError, match="the worker exited with status 2"):
        launcher.supervise([server, worker], {}, tmp_path, [])
    server.process.communicate()


def test_waiting_is_reported_with_what_loads_and_the_last_state_of_its_log(
    launcher: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "worker.log").write_text("started\n\rmodel-1: 10%\rmodel-1: 37%\x1b[A\n\n")
    report = launcher._progress("worker", tmp_path, 190.4)
    assert report == r"run: 190 s: waiting for the worker, which loads the model: model-1: 37%\u001b[A"
    assert launcher._progress("server", tmp_path, 5).endswith(
        "waiting for the server to start: its log is empty so far"
    )


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"server.host": "::1"}, "http://[::1]:8000"),
        ({"server.host": "::"}, "http://[::1]:8000"),
        ({"server.host": "0.0.0.0"}, "http://127.0.0.1:8000"),
    ],
)
def test_the_printed_address_can_be_opened(launcher: ModuleType, given: dict[str, str], address: str) -> None:
    settings = load_settings({}, given)
    assert launcher._address(settings) == address
    assert f"{address}/playground" in launcher._greeting(settings, Path("log"), 1.0)


@pytest.mark.parametrize(
    ("environment", "header"),
    [
        ({}, []),
        ({"ZIMAGE_SERVER__API_KEYS": '{anna = "anna-key-0123456789"}'}, ["-H", "Authorization: Bearer KEY"]),
        ({"ZIMAGE_SERVER__KEYLESS": "false"}, ["-H", "Authorization: Bearer generated"]),
        ({"ZIMAGE_SERVER__HOST": "0.0.0.0"}, ["-H", "Authorization: Bearer generated"]),
    ],
)
def test_the_printed_command_has_the_key_that_is_needed(
    launcher: ModuleType, tmp_path: Path, environment: dict[str, str], header: list[str]
) -> None:
    """A shell reads the command, with a program in place of curl that prints its arguments."""
    folder = tmp_path / "it's a folder"
    (folder / "keys").mkdir(parents=True)
    (folder / "keys" / "api").write_text("generated\n")
    chosen = launcher.with_keyless({"ZIMAGE_DATA_DIR": str(folder), **environment})
    greeting: str = launcher._greeting(load_settings(chosen), Path("log"), 1.0)
    command = greeting.partition("  try      curl ")[2].partition("  stop")[0]
    printed = subprocess.run(["sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
    arguments = printed.stdout.splitlines()
    assert arguments[6:-2] == header
    assert json.loads(arguments[-1])["prompt"]


def test_the_launcher_sets_keyless_only_where_no_choice_was_made_and_no_other_machine_reaches_it(
    launcher: ModuleType,
) -> None:
    def is_keyless(**given: str) -> bool:
        names = {f"ZIMAGE_SERVER__{name.upper()}": value for name, value in given.items()}
        return load_settings(launcher.with_keyless(names)).server.keyless

    assert is_keyless()
    assert is_keyless(host="::1")
    assert not is_keyless(host="0.0.0.0")
    assert not is_keyless(keyless="false")
    assert not is_keyless(api_keys='{anna = "anna-key-0123456789"}')


@pytest.fixture(scope="module")
def launcher() -> ModuleType:
    """The launcher's functions."""
    spec = importlib.util.spec_from_file_location("launcher", TREE / "bin" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _ended(launcher: ModuleType, name: str, logs: Path, code: str, **options: Any) -> Any:
    """Run Python code as a child of the launcher."""
    log = logs / f"{name}.log"
    log.touch()
    process = subprocess.Popen(
        [sys.executable, "-c", code], start_new_session=True, stderr=subprocess.DEVNULL, **options
    )
    return launcher.Child(name, process, log, time.monotonic())


def _process(launcher: subprocess.Popen[str], name: str) -> int | None:
    """Return the process of the launcher that runs this package, if there is one."""
    for pid in _children(launcher.pid):
        with contextlib.suppress(OSError):
            if f"-m\0{name}\0" in Path(f"/proc/{pid}/cmdline").read_text():
                return pid
    return None


@contextmanager
def _service(folder: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the launcher until its API is ready, and yield it with the address."""
    port = free_port()
    launcher = subprocess.Popen(
        [sys.executable, TREE / "bin" / "run.py"],
        env=_settings(folder, {"ZIMAGE_SERVER__PORT": str(port), **environment}),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines: list[str] = []
    assert launcher.stdout is not None
    reader = threading.Thread(target=lines.extend, args=(launcher.stdout,))
    reader.start()

    def is_ready() -> bool:
        assert launcher.poll() is None, launcher.stderr and launcher.stderr.read()
        return any("ready after" in line for line in lines)

    try:
        wait_until(is_ready, timeout_s=240)
        yield launcher, f"http://127.0.0.1:{port}"
    finally:
        launcher.terminate()
        launcher.wait(60)
        reader.join()
        launcher.stdout.close()
        if launcher.stderr:
            launcher.stderr.close()


def _run(folder: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    variables = {"ZIMAGE_SERVER__PORT": str(free_port()), **environment}
    command = [sys.executable, TREE / "bin" / "run.py"]
    return subprocess.run(command, env=_settings(folder, variables), capture_output=True, text=True, timeout=120)


def _settings(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, "ZIMAGE_DATA_DIR": str(folder / "data"), **environment}


def _environment(tree: Path, folder: Path, fake: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **_with_fake(folder, fake)}
    command = [sys.executable, tree / "bin" / "environment.py", "test"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def _with_fake(folder: Path, code: str) -> dict[str, str]:
    """Simulate another machine: Python runs `sitecustomize` before everything else."""
    path = folder / "fake"
    path.mkdir()
    (path / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(path)}


def _children(pid: int) -> list[int]:
    """Return all descendants of a process, from /proc."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [child for child, parent in parents.items() if parent == pid]
    return found + [below for child in found for below in _children(child)]
