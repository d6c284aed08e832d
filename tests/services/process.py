"""Server processes that end with the test run that started them, even if the run is killed.

Linux sends a child a signal when its parent dies, but only if the child has requested it after changing its user. The
command is therefore started through this file, which makes the request and then becomes the command. On other systems
only an orderly end of a test run stops its servers.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Account:
    """A user of the operating system."""

    uid: int
    gid: int


@dataclass(frozen=True)
class Running:
    """A started process and its log file."""

    process: subprocess.Popen[bytes]
    log: Path

    def send(self, number: int) -> None:
        """Send a signal; does nothing if the process has already ended."""
        self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 20.0) -> int:
        """Send a signal, then SIGKILL after `timeout_s`, and return the exit status."""
        self.send(number)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL)
            return self.process.wait()

    def check(self) -> None:
        """Raise `RuntimeError` with the end of its log if it has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.log.stem} ended with {self.process.returncode}:\n{self.last_lines()}")

    def last_lines(self, count: int = 30) -> str:
        """Return the last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])


def start(
    command: Sequence[str | Path],
    log: Path,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    account: Account | None = None,
    at_parents_death: int = signal.SIGKILL,
) -> Running:
    """Start `command` in a new session, with its output in `log`.

    Call it on the main thread: the kernel treats the end of the calling thread as the end of the parent.
    """
    user = f"{account.uid}:{account.gid}" if account else "-"
    wrapped = [sys.executable, "-ISs", __file__, str(os.getpid()), str(at_parents_death), user, *map(str, command)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            wrapped,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=None if environment is None else dict(environment),
            cwd=folder,
            start_new_session=True,
        )
    return Running(process, log)


def free_ports(count: int) -> list[int]:
    """Return `count` different ports of the loopback interface that are free at this moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [bound.getsockname()[1] for bound in sockets]
    for bound in sockets:
        bound.close()
    return ports


def free_port() -> int:
    """Return one free port of the loopback interface."""
    return free_ports(1)[0]


def _become(parent: int, at_parents_death: int, user: str, command: list[str]) -> None:
    if user != "-":
        uid, gid = map(int, user.split(":"))
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, at_parents_death)
        if os.getppid() != parent:
            sys.exit("the test run ended before its server started")
    os.execv(command[0], command)


if __name__ == "__main__":
    _become(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
