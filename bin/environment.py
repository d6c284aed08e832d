"""Create or update the virtual environment in .venv.

    python3 bin/environment.py run      for the server and the worker
    python3 bin/environment.py test     also for tests and checks

Installs the project from this tree with the dependencies in pyproject.toml, in the versions of
config/requirements.lock, from the indexes in pip's configuration. Returns at once if nothing has changed since the last
call. Errors are one line. Uses only the standard library and Python 3.6 syntax, so that an old Python can report that
it is too old.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed.txt"
LOCK = ROOT / "config" / "requirements.lock"

OLDEST_PYTHON = (3, 11)
UV = "uv==0.13.9"
PIP_INDEX = "https://pypi.org/simple/pip/"
PIP_WHEEL = "pip-26.3-py3-none-any.whl"
NO_VENV = "this Python cannot make virtual environments; on Debian: apt-get install python3-venv"
EXTRAS = {"run": "server,worker", "test": "server,worker,dev"}
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
# Measured: .venv takes 1.8 GB with the CPU build of torch and 5.2 GB with its CUDA build; the rest is for downloads.
FIRST_INSTALL_BYTES = 3 * 10**9
FIRST_CUDA_INSTALL_BYTES = 9 * 10**9
LATER_INSTALL_BYTES = 3 * 10**8


class SetupError(Exception):
    """A reason, in one line, why the environment cannot be created."""


def main(arguments):
    purpose = arguments[0] if arguments else "run"
    if purpose not in EXTRAS:
        print("environment: argument must be one of {}, not {!r}".format(", ".join(EXTRAS), purpose), file=sys.stderr)
        return 2
    try:
        make(purpose)
    except SetupError as error:
        print("environment: {}".format(error), file=sys.stderr)
        return 1
    return 0


def make(purpose):
    """Install what `purpose` needs into .venv; return at once if it is up to date."""
    check_python(sys.version_info)
    before, made_of = installed()
    purpose = "test" if before == "test" else purpose  # an environment for tests can run the service too
    if (before, made_of) == (purpose, fingerprint()):
        return
    cuda = has_cuda()
    check_disk(shutil.disk_usage(str(ROOT)).free, already_made=before is not None, cuda=cuda)
    print(
        "environment: installing into .venv for `{}`; the first time takes minutes".format(purpose),
        flush=True,
    )
    make_venv()
    if STAMP.exists():
        STAMP.unlink()
    install("-c", str(LOCK), "-e", ".[{}]".format(EXTRAS[purpose]), cuda=cuda)
    STAMP.write_text("{} {}\n".format(purpose, fingerprint()))
    print("environment: .venv is ready", flush=True)


def check_python(version):
    """Raise `SetupError` if this Python is too old for the project."""
    if tuple(version[:2]) < OLDEST_PYTHON:
        raise SetupError(
            "Python {}.{} is too old, {}.{} or newer is needed; select one: make PYTHON=/path/to/python3 ...".format(
                version[0], version[1], *OLDEST_PYTHON
            )
        )


def check_disk(free_bytes, already_made, cuda):
    """Raise `SetupError` if the disk has too little space for the installation."""
    needed = LATER_INSTALL_BYTES if already_made else FIRST_CUDA_INSTALL_BYTES if cuda else FIRST_INSTALL_BYTES
    if free_bytes < needed:
        raise SetupError(
            "the disk of {} has {:.1f} GB free, but the installation needs about {:.1f} GB; free some space".format(
                ROOT, free_bytes / 1e9, needed / 1e9
            )
        )


def fingerprint():
    """Return a digest of everything that an installation depends on."""
    digest = hashlib.sha256()
    for path in (LOCK, ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    digest.update("{}.{} {}".format(sys.version_info[0], sys.version_info[1], ROOT).encode())
    digest.update(" ".join(name for name in ("server", "worker", "zcore") if (ROOT / name).is_dir()).encode())
    return digest.hexdigest()[:32]


def installed():
    """Return the purpose and fingerprint of the last complete installation, or (None, None)."""
    try:
        purpose, made_of = STAMP.read_text().split()
    except (OSError, ValueError):
        return None, None
    return (purpose, made_of) if PYTHON.exists() else (None, None)


def has_cuda():
    """Return whether this machine has a working NVIDIA driver."""
    found = shutil.which("nvidia-smi")
    return found is not None and subprocess.call([found], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0


def make_venv():
    """Create .venv with pip inside, or replace it if it was created by another Python version."""
    same = [str(PYTHON), "-c", "import sys, pip; print(sys.version_info[:2])"]
    made = subprocess.run(same, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) if PYTHON.exists() else None
    if made is not None and made.stdout.decode().strip() == str(tuple(sys.version_info[:2])):
        return
    try:
        import venv
    except ImportError:
        raise SetupError(NO_VENV) from None
    has_pip = importlib.util.find_spec("ensurepip") is not None
    try:
        venv.create(str(VENV), clear=True, with_pip=has_pip, symlinks=True)
        if not has_pip:
            fetch_pip()
    except urllib.error.URLError:
        raise SetupError(NO_VENV) from None
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError("cannot create a virtual environment in {}: {}".format(VENV, error)) from None


def fetch_pip():
    """Install pip from PyPI, for Debian, where `ensurepip` is in a package that only root can install."""
    request = urllib.request.Request(PIP_INDEX, headers={"Accept": "application/vnd.pypi.simple.v1+json"})  # PEP 691
    with urllib.request.urlopen(request, timeout=30) as response:
        wheel = next(file for file in json.load(response)["files"] if file["filename"] == PIP_WHEEL)
    with urllib.request.urlopen(urllib.parse.urljoin(PIP_INDEX, wheel["url"]), timeout=120) as response:
        content = response.read()
    if hashlib.sha256(content).hexdigest() != wheel["hashes"]["sha256"]:
        raise SetupError("the download of pip from PyPI does not match its checksum; try again")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, PIP_WHEEL)
        Path(path).write_bytes(content)
        # A pure Python wheel can run without being installed, so pip can install itself.
        command = [str(PYTHON), os.path.join(path, "pip"), "install", "--quiet", "--no-index", path]
        subprocess.check_call(command)


def install(*requirements, cuda):
    """Install with uv if it is available, else with pip. Prefer the smaller CPU build of torch if there is no GPU."""
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install"]
    has_uv = subprocess.call(pip + ["--quiet", UV], stderr=subprocess.DEVNULL) == 0
    attempts = [uv_install() + options for options in uv_torch_options(cuda)] if has_uv else []
    attempts += [pip + options for options in pip_torch_options(cuda)]
    for number, attempt in enumerate(attempts):
        if number:
            print("environment: the installation failed; trying another way", file=sys.stderr, flush=True)
        if subprocess.call(attempt + list(requirements), cwd=str(ROOT)) == 0:
            return
    if shutil.disk_usage(str(ROOT)).free < LATER_INSTALL_BYTES:
        raise SetupError("the disk of {} is full; free some space and try again".format(ROOT))
    raise SetupError("the packages could not be installed; see the errors above")


def uv_torch_options(cuda):
    """Return uv's options for torch, best first.

    Folders of wheels configured for pip take precedence, since they are a deliberate choice. Without them, a machine
    without a GPU takes the CPU build from PyTorch's own index, or the default build if that index cannot be reached.
    """
    folders = uv_find_links()
    if folders:
        return [folders]
    return [[]] if cuda else [["--torch-backend", "cpu"], []]


def pip_torch_options(cuda):
    """Return pip's options for torch. pip finds configured wheels itself, and only warns of an unreachable index."""
    if cuda or pip_setting("find-links"):
        return [[]]
    return [["--retries", "0", "--extra-index-url", CPU_WHEELS], []]


def uv_install():
    """Return uv's install command."""
    return [str(VENV / "bin" / "uv"), "pip", "install"] + uv_sources()


def uv_tool(requirement):
    """Return the start of a command that runs in an environment of its own, which has only this tool; for tests."""
    return [str(VENV / "bin" / "uv"), "tool", "run", "--from", requirement] + uv_sources() + uv_find_links()


def uv_sources():
    """Return uv's options for this Python, pip's index and the system's certificates; it ignores both by default."""
    index = pip_setting("index-url")
    trust = ssl.get_default_verify_paths()
    return (
        ["--python", str(PYTHON)]
        + (["--system-certs"] if trust.cafile or trust.capath else [])
        + (["--default-index", index] if index else [])
    )


def uv_find_links():
    """Return uv's options for the folders of wheels that are configured for pip."""
    return [part for folder in pip_setting("find-links").split() for part in ("--find-links", folder)]


def pip_setting(name):
    """Return a pip setting from its environment variable or configuration files; empty if unset."""
    from_environment = os.environ.get("PIP_" + name.upper().replace("-", "_"))
    if from_environment is not None:
        return from_environment
    for section in ("global", "install"):
        result = subprocess.run(
            [str(PYTHON), "-m", "pip", "config", "get", section + "." + name],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        if result.returncode == 0:
            return result.stdout.decode().strip()
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
