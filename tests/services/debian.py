"""Programs that only Debian packages: installed with apt-get where that is possible without asking."""

import os
import shutil
import subprocess


def install(*packages: str) -> None:
    """Try to install packages; does nothing unless root calls it on a system with apt-get."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        subprocess.run(["apt-get", "--quiet", *command], env=environment, stdin=subprocess.DEVNULL, check=False)
