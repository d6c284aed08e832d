"""Resolve pyproject.toml into config/requirements.lock: one pin for every package of a full installation.

    make lock

The file holds names and versions only, neither hosts nor hashes: the same pins serve pip and uv, and torch's CPU and
CUDA builds, which the machine that installs chooses between. So a build tag as in `2.13.0+cpu` is dropped, and what
only one of the builds brings along is left out.
"""

import re
import subprocess

import environment

HEAD = """\
# Every pinned version of a full installation, written by `make lock`. Used as constraints, by pip and by uv alike:
#     pip install -c config/requirements.lock '.[server]'
# torch carries no build tag: its CPU and its CUDA build both satisfy the pin, and bring their own companions.
"""
OF_ONE_BUILD = re.compile(r"(nvidia-|cuda-|triton)")


def main() -> None:
    """Write the lock anew."""
    folders = environment.pip_setting("find-links").split()
    command = [
        environment.VENV / "bin" / "uv", "pip", "compile", "--quiet", "--python-version", "3.11",
        "--no-header", "--no-annotate", "--no-emit-find-links", "--no-emit-index-url", "--upgrade",
        *(part for folder in folders for part in ("--find-links", folder)),
        "--extra", "server", "--extra", "worker", "--extra", "dev", "pyproject.toml",
    ]  # fmt: skip
    resolved = subprocess.run(command, cwd=environment.ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    environment.LOCK.write_text(HEAD + "".join(f"{pin}\n" for pin in portable(resolved)))


def portable(resolved: str) -> list[str]:
    """The pins that hold on every machine."""
    return [re.sub(r"\+\S+", "", pin) for pin in resolved.splitlines() if not OF_ONE_BUILD.match(pin)]


if __name__ == "__main__":
    main()
