"""Make the virtual environment in .venv, or find that it is already right.

    python3 bin/environment.py run      the server and the worker
    python3 bin/environment.py test     those, and all that tests and checks need

Takes pyproject.toml (what is needed), config/requirements.lock (which versions) and pip's own configuration (from
where). Gives .venv with the project installed from this tree; a second call with nothing changed returns at once.
What stops it is said in one line. Uses only the standard library, and no syntax newer than Python 3.6, so that an old
Python can say that it is too old. Does not know what the project does.
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
# Measured: .venv takes 1.8 GB with torch's CPU build and 5.2 GB with its CUDA build; the rest is for the downloads.
FIRST_INSTALL_BYTES = 3 * 10**9
FIRST_CUDA_INSTALL_BYTES = 9 * 10**9
LATER_INSTALL_BYTES = 3 * 10**8


class Refusal(Exception):
    """Why no environment can be made: one line for the person who asked."""


def main(arguments):
    purpose = arguments[0] if arguments else "run"
    if purpose not in EXTRAS:
        print("environment: say one of {}, not {!r}".format(", ".join(EXTRAS), purpose), file=sys.stderr)
        return 2
    try:
        make(purpose)
    except Refusal as refusal:
        print("environment: {}".format(refusal), file=sys.stderr)
        return 1
    return 0


def make(purpose):
    """Bring .venv to what `purpose` needs; returns at once when it is there."""
    check_python(sys.version_info)
    before, made_of = installed()
    purpose = "test" if before == "test" else purpose  # what can test can run, and stays able to test
    if (before, made_of) == (purpose, fingerprint()):
        return
    cuda = has_cuda()
    check_disk(shutil.disk_usage(str(ROOT)).free, already_made=before is not None, cuda=cuda)
    print(
        "environment: installing into .venv what `{}` needs; the first time takes minutes".format(purpose), flush=True
    )
    make_venv()
    if STAMP.exists():
        STAMP.unlink()
    install("-c", str(LOCK), "-e", ".[{}]".format(EXTRAS[purpose]), cuda=cuda)
    STAMP.write_text("{} {}\n".format(purpose, fingerprint()))
    print("environment: .venv is ready", flush=True)


def check_python(version):
    """Refuse a Python that the project cannot run on."""
    if tuple(version[:2]) < OLDEST_PYTHON:
        raise Refusal(
            "Python {}.{} is too old, {}.{} or newer is needed; name one: make PYTHON=/path/to/python3 ...".format(
                version[0], version[1], *OLDEST_PYTHON
            )
        )


def check_disk(free_bytes, already_made, cuda):
    """Refuse to begin an installation that the disk cannot hold."""
    needed = LATER_INSTALL_BYTES if already_made else FIRST_CUDA_INSTALL_BYTES if cuda else FIRST_INSTALL_BYTES
    if free_bytes < needed:
        raise Refusal(
            "the disk of {} has {:.1f} GB free, the installation needs about {:.1f} GB".format(
                ROOT, free_bytes / 1e9, needed / 1e9
            )
        )


def fingerprint():
    """All that an installation depends on, as one word."""
    digest = hashlib.sha256()
    for path in (LOCK, ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    digest.update("{}.{} {}".format(sys.version_info[0], sys.version_info[1], ROOT).encode())
    digest.update(" ".join(name for name in ("server", "worker", "zcore") if (ROOT / name).is_dir()).encode())
    return digest.hexdigest()[:32]


def installed():
    """The purpose and the fingerprint of the last finished installation; twice None when there is none."""
    try:
        purpose, made_of = STAMP.read_text().split()
    except (OSError, ValueError):
        return None, None
    return (purpose, made_of) if PYTHON.exists() else (None, None)


def has_cuda():
    """Whether this machine has an NVIDIA driver that answers."""
    found = shutil.which("nvidia-smi")
    return found is not None and subprocess.call([found], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0


def make_venv():
    """Make .venv with pip inside, anew when it belongs to another Python."""
    same = [str(PYTHON), "-c", "import sys, pip; print(sys.version_info[:2])"]
    made = subprocess.run(same, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) if PYTHON.exists() else None
    if made is not None and made.stdout.decode().strip() == str(tuple(sys.version_info[:2])):
        return
    try:
        import venv
    except ImportError:
        raise Refusal(NO_VENV) from None
    has_pip = importlib.util.find_spec("ensurepip") is not None
    try:
        venv.create(str(VENV), clear=True, with_pip=has_pip, symlinks=True)
        if not has_pip:
            fetch_pip()
    except urllib.error.URLError:
        raise Refusal(NO_VENV) from None
    except (OSError, subprocess.CalledProcessError) as error:
        raise Refusal("no virtual environment could be made in {}: {}".format(VENV, error)) from None


def fetch_pip():
    """Bring pip into .venv from PyPI, for a Debian whose `ensurepip` is in a package that only root may install."""
    asked = urllib.request.Request(PIP_INDEX, headers={"Accept": "application/vnd.pypi.simple.v1+json"})  # PEP 691
    with urllib.request.urlopen(asked, timeout=30) as answer:
        wheel = next(file for file in json.load(answer)["files"] if file["filename"] == PIP_WHEEL)
    with urllib.request.urlopen(urllib.parse.urljoin(PIP_INDEX, wheel["url"]), timeout=120) as answer:
        content = answer.read()
    if hashlib.sha256(content).hexdigest() != wheel["hashes"]["sha256"]:
        raise Refusal("pip's wheel did not arrive as PyPI describes it")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, PIP_WHEEL)
        Path(path).write_bytes(content)
        # A wheel of pure Python runs from where it lies, and so pip installs itself.
        command = [str(PYTHON), os.path.join(path, "pip"), "install", "--quiet", "--no-index", path]
        subprocess.check_call(command)


def install(*wanted, cuda):
    """Install by uv where it can be had, else by pip; either way the smaller CPU build of torch where that will do."""
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install"]
    has_uv = subprocess.call(pip + ["--quiet", UV], stderr=subprocess.DEVNULL) == 0
    attempts = [uv_install() + options for options in uv_torch_options(cuda)] if has_uv else []
    attempts += [pip + options for options in pip_torch_options(cuda)]
    for number, attempt in enumerate(attempts):
        if number:
            print("environment: that did not work; trying another way", file=sys.stderr, flush=True)
        if subprocess.call(attempt + list(wanted), cwd=str(ROOT)) == 0:
            return
    if shutil.disk_usage(str(ROOT)).free < LATER_INSTALL_BYTES:
        raise Refusal("the disk of {} is full".format(ROOT))
    raise Refusal("the packages could not be installed; the lines above say why")


def uv_torch_options(cuda):
    """How to ask uv for torch, the best way first.

    Wheels that this machine keeps for pip come first: whoever put them there has chosen. Without them a machine without
    a GPU takes the CPU build from PyTorch's own index, and the usual one where that cannot be reached.
    """
    folders = pip_setting("find-links").split()
    if folders:
        return [[part for folder in folders for part in ("--find-links", folder)]]
    return [[]] if cuda else [["--torch-backend", "cpu"], []]


def pip_torch_options(cuda):
    """The same for pip, which finds configured wheels by itself. An index that cannot be reached is only a warning."""
    if cuda or pip_setting("find-links"):
        return [[]]
    return [["--retries", "0", "--extra-index-url", CPU_WHEELS], []]


def uv_install():
    """uv's command, with pip's index and this machine's certificates: by itself uv looks at neither."""
    index = pip_setting("index-url")
    trust = ssl.get_default_verify_paths()
    return (
        [str(VENV / "bin" / "uv"), "pip", "install", "--python", str(PYTHON)]
        + (["--system-certs"] if trust.cafile or trust.capath else [])
        + (["--default-index", index] if index else [])
    )


def pip_setting(name):
    """A setting of pip's, from its environment variable or its files; empty when unset."""
    from_environment = os.environ.get("PIP_" + name.upper().replace("-", "_"))
    if from_environment is not None:
        return from_environment
    for section in ("global", "install"):
        asked = subprocess.run(
            [str(PYTHON), "-m", "pip", "config", "get", section + "." + name],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        if asked.returncode == 0:
            return asked.stdout.decode().strip()
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
