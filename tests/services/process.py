"""A server process that lives no longer than the test run that started it, however that run ends.

Linux sends a child a signal when its parent dies, but only when the child asks for it, after it has changed its user.
So the command is started through this file, which asks and then becomes the command. Elsewhere only the orderly end
of a test run stops its servers.
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
    """A started process, and where it writes what it has to say."""

    process: subprocess.Popen[bytes]
    log: Path

    def send(self, number: int) -> None:
        """Send a signal; nothing happens when the process is gone already."""
        self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 20.0) -> int:
        """Ask it to end, insist after `timeout_s`, and give its exit status."""
        self.send(number)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL)
            return self.process.wait()

    def check(self) -> None:
        """Raise with the end of its log when it has ended by itself."""
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.log.stem} ended with {self.process.returncode}:\n{self.last_lines()}")

    def last_lines(self, count: int = 30) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])


def start(
    command: Sequence[str | Path],
    log: Path,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    account: Account | None = None,
    at_parents_death: int = signal.SIGKILL,
) -> Running:
    """Start `command` in a session of its own, its output in `log`.

    Call it on the main thread: the kernel takes the end of the calling thread for the end of the parent.
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
    """Ports of the loopback interface that nobody listens on at this moment, all different."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [bound.getsockname()[1] for bound in sockets]
    for bound in sockets:
        bound.close()
    return ports


def free_port() -> int:
    """One such port."""
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
            sys.exit("the test run ended before its server began")
    os.execv(command[0], command)


if __name__ == "__main__":
    _become(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
