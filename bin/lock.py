"""Resolve pyproject.toml into config/requirements.lock, with one pin for every package of a full installation.

    make lock

The file contains names and versions but no hosts or hashes, so that the same pins serve pip and uv, and both the CPU
and the CUDA build of torch. Build tags such as `+cpu` are removed, and packages that only one of the builds needs are
left out.
"""

import re
import subprocess

import environment

HEAD = """\
# Pinned versions of a full installation, written by `make lock`. Used as constraints by pip and uv:
#     pip install -c config/requirements.lock '.[server]'
# torch has no build tag: its CPU and its CUDA build both satisfy the pin, and install their own dependencies.
"""
CUDA_ONLY = re.compile(r"(nvidia-|cuda-|triton)")


def main() -> None:
    """Write the lock file."""
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
    """Return the pins that are valid on every machine."""
    return [re.sub(r"\+\S+", "", pin) for pin in resolved.splitlines() if not CUDA_ONLY.match(pin)]


if __name__ == "__main__":
    main()
