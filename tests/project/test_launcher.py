"""The commands of the Makefile: what stops them is said in one line, and what they start ends with them."""

import ast
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.services.process import free_port
from tests.waiting import wait_until

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
    """What `make environment` needs, in a folder where nothing is installed yet."""
    for name in ("pyproject.toml", "config/requirements.lock", "bin/environment.py"):
        target = tmp_path / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TREE / name, target)
    return tmp_path / "tree"


def test_an_old_python_is_refused_in_one_line(copied_tree: Path, tmp_path: Path) -> None:
    refused = _environment(copied_tree, tmp_path, OLD_PYTHON)
    assert refused.returncode == 1
    assert refused.stderr == (
        "environment: Python 3.9 is too old, 3.11 or newer is needed; name one: make PYTHON=/path/to/python3 ...\n"
    )


def test_an_old_python_can_read_the_file_that_refuses_it() -> None:
    ast.parse((TREE / "bin" / "environment.py").read_text(), feature_version=(3, 6))


def test_a_full_disk_is_refused_in_one_line_before_anything_is_installed(copied_tree: Path, tmp_path: Path) -> None:
    refused = _environment(copied_tree, tmp_path, NO_SPACE)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"environment: the disk of {copied_tree} has 0.0 GB free")
    assert refused.stderr.count("\n") == 1
    assert not (copied_tree / ".venv").exists()


@pytest.mark.parametrize("fake", [NO_VENV, NO_ENSUREPIP_AND_NO_NETWORK], ids=["no venv", "no ensurepip, no network"])
def test_a_python_without_venv_is_refused_in_one_line(copied_tree: Path, tmp_path: Path, fake: str) -> None:
    refused = _environment(copied_tree, tmp_path, fake)
    assert refused.returncode == 1
    assert refused.stderr == (
        "environment: this Python cannot make virtual environments; on Debian: apt-get install python3-venv\n"
    )


def test_an_environment_that_is_right_is_left_alone() -> None:
    command = [sys.executable, TREE / "bin" / "environment.py", "run"]
    subprocess.run(command, capture_output=True, check=True)
    again = subprocess.run(command, capture_output=True, text=True)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


def test_a_taken_port_is_refused_in_one_line_that_names_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = _run(tmp_path, {"ZIMAGE_SERVER__PORT": str(port)})
    assert refused.returncode == 1
    assert refused.stderr.startswith(
        f"run: port {port} of 127.0.0.1 cannot be had (Address already in use); choose another:"
    )
    assert refused.stderr.count("\n") == 1


def test_a_full_disk_is_refused_in_one_line_before_the_database_is_made(tmp_path: Path) -> None:
    refused = _run(tmp_path, _with_fake(tmp_path, NO_SPACE))
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"run: the disk of {tmp_path / 'kept'} has 0 MB free")
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "kept").exists()


def test_a_wrong_setting_is_refused_in_one_line(tmp_path: Path) -> None:
    refused = _run(tmp_path, {"ZIMAGE_SERVER__PROT": "1"})
    assert refused.returncode == 1
    assert refused.stderr.startswith("run: environment variable ZIMAGE_SERVER__PROT is not a setting; did you mean")
    assert refused.stderr.count("\n") == 1


def test_a_missing_compiler_is_said_once_before_the_start(tmp_path: Path) -> None:
    stopped_early = {"ZIMAGE_PYTORCH__COMPILE": "true", "ZIMAGE_DATABASE__URL": "mysql://nowhere"}
    without = _run(tmp_path, {**stopped_early, "PATH": str(tmp_path), "CXX": ""})
    with_one = _run(tmp_path, {**stopped_early, "PATH": str(tmp_path), "CXX": sys.executable})
    warning = (
        "run: pytorch.compile is on, but no C++ compiler is here: install g++ or set ZIMAGE_PYTORCH__COMPILE=false"
    )
    assert without.stderr.splitlines()[0] == warning
    assert warning not in with_one.stderr


def test_a_database_that_cannot_be_made_ready_is_named(tmp_path: Path) -> None:
    refused = _run(tmp_path, {"ZIMAGE_DATABASE__URL": "mysql://nowhere"})
    assert refused.returncode == 1
    assert "run: the database could not be made ready" in refused.stderr
    assert "mysql is not supported" in refused.stderr


@pytest.mark.acceptance
def test_the_service_answers_makes_a_picture_and_stops_without_a_trace(tmp_path: Path) -> None:
    with _service(tmp_path) as (launcher, address):
        body = {"prompt": "a red circle on a white background", "seed": 42, "steps": 2, "width": 64, "height": 64}
        made = httpx.post(f"{address}/api/generate", json=body, headers={"Prefer": "wait=60"}, timeout=90)
        assert made.json()["status"] == "succeeded", made.text
        processes = _children(launcher.pid)
        assert len(processes) >= 2
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(30) == 0
    assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()]
    with _service(tmp_path) as (_, address):
        kept = httpx.get(f"{address}/api/jobs", timeout=30).json()
        assert made.json()["id"] in str(kept)


@pytest.mark.acceptance
@pytest.mark.parametrize("name", ["server", "worker"])
def test_the_death_of_one_process_ends_the_service_with_its_last_words(tmp_path: Path, name: str) -> None:
    with _service(tmp_path) as (launcher, _):
        processes = _children(launcher.pid)
        victim = next(pid for pid in processes if f"-m\0{name}\0" in Path(f"/proc/{pid}/cmdline").read_text())
        os.kill(victim, signal.SIGKILL)
        assert launcher.wait(60) == 1
        assert launcher.stderr is not None
        assert f"run: the {name} ended with status -9" in launcher.stderr.read()
    assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()]


@contextmanager
def _service(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The launcher with an API that answers, and its address."""
    port = free_port()
    launcher = subprocess.Popen(
        [sys.executable, TREE / "bin" / "run.py"],
        env=_settings(folder, {"ZIMAGE_SERVER__PORT": str(port)}),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines: list[str] = []
    assert launcher.stdout is not None
    reader = threading.Thread(target=lines.extend, args=(launcher.stdout,))
    reader.start()

    def has_greeted() -> bool:
        assert launcher.poll() is None, launcher.stderr and launcher.stderr.read()
        return any("ready after" in line for line in lines)

    try:
        wait_until(has_greeted, timeout_s=240)
        yield launcher, f"http://127.0.0.1:{port}"
    finally:
        launcher.terminate()
        launcher.wait(60)
        reader.join()
        launcher.stdout.close()
        if launcher.stderr:
            launcher.stderr.close()


def _run(folder: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    given = {"ZIMAGE_SERVER__PORT": str(free_port()), **environment}
    command = [sys.executable, TREE / "bin" / "run.py"]
    return subprocess.run(command, env=_settings(folder, given), capture_output=True, text=True, timeout=120)


def _settings(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, "ZIMAGE_DATA_DIR": str(folder / "kept"), **environment}


def _environment(tree: Path, folder: Path, fake: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **_with_fake(folder, fake)}
    command = [sys.executable, tree / "bin" / "environment.py", "test"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def _with_fake(folder: Path, code: str) -> dict[str, str]:
    """A machine of another kind: Python runs `sitecustomize` before everything else."""
    place = folder / "fake"
    place.mkdir()
    (place / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(place)}


def _children(pid: int) -> list[int]:
    """All processes below one, from what the kernel says of each."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [child for child, parent in parents.items() if parent == pid]
    return found + [below for child in found for below in _children(child)]
