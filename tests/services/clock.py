"""Clocks of processes that a test may set while they run, as an administrator or a wrong time server does.

A library of our own stands between a process and the kernel's wall clock; the monotonic clock and the times of files
stay as they are. (Debian's libfaketime breaks `time.sleep`, which waits until a time of the monotonic clock.) There is
no PyPI package of a C compiler, so `make test` installs Debian's if root runs it.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.services import debian

SOURCE = Path(__file__).with_suffix(".c")


class Clock:
    """The wall clock of the processes whose command begins with its `prefix`; at first the kernel's."""

    def __init__(self, library: Path, file: Path) -> None:
        """`file` holds the offset. The processes must be able to read both files."""
        self._library = library
        self._file = file
        self.set(0)
        file.chmod(0o644)

    def set(self, offset_s: float) -> None:
        """Set it this many seconds ahead of the kernel's, or behind if negative."""
        mode = "r+b" if self._file.exists() else "w+b"  # processes have it mapped: it must stay the same file
        with self._file.open(mode, buffering=0) as file:
            file.write(round(offset_s * 1_000_000).to_bytes(8, sys.byteorder, signed=True))

    @property
    def prefix(self) -> Sequence[str]:
        """Beginning of a command line."""
        return ["/usr/bin/env", f"LD_PRELOAD={self._library}", f"ZIMAGE_TEST_CLOCK={self._file}"]


@contextmanager
def adjustable() -> Generator[Callable[[str], Clock]]:
    """Yield a function that makes a clock of this name."""
    with tempfile.TemporaryDirectory(prefix="zimage-clocks-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL runs as another user than root
        library = folder / "clock.so"
        compiler = installed()
        assert compiler is not None, (
            "a C compiler is missing: apt-get install gcc libc6-dev, as `make test` does for root"
        )
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, SOURCE], check=True)
        yield lambda clock: Clock(library, folder / clock)


def installed() -> str | None:
    """Return the path of this machine's C compiler, or None. The library is for Linux."""
    return shutil.which("cc") if sys.platform == "linux" else None


if __name__ == "__main__":
    if installed() is None:
        debian.install("gcc", "libc6-dev")
