"""A real pgbouncer in transaction mode, between tests and their PostgreSQL.

There is no PyPI package of it, so `make test` installs Debian's if root runs it. A missing one fails tests in CI, and
skips them on a developer's machine.
"""

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from tests.services import debian, process
from tests.services.postgres import Postgres, other_account
from tests.services.service import Service

SETTINGS = """
[databases]
* = host={host} port={postgres_port} user={user}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = {pool_size}
max_client_conn = 500
"""


@contextmanager
def pooling(postgres: Postgres, url: str, pool_size: int) -> Generator[str]:
    """Yield a URL of the same database behind a pooler that opens at most `pool_size` connections to it."""
    program = installed()
    if program is None:
        pytest.fail("pgbouncer is missing: apt-get install pgbouncer, as `make test` does for root")
    port = process.free_port()
    with tempfile.TemporaryDirectory(prefix="zimage-pgbouncer-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        settings = folder / "pgbouncer.ini"
        settings.write_text(
            SETTINGS.format(
                host=postgres.url.host,
                postgres_port=postgres.url.port,
                user=postgres.url.username,
                port=port,
                pool_size=pool_size,
            )
        )
        settings.chmod(0o644)  # it runs as another user than root
        pooled = make_url(url).set(port=port)

        def begin() -> process.Running:
            return process.start([program, settings], folder / "pgbouncer.log", folder=folder, account=other_account())

        def answers() -> bool:
            plain = pooled.set(drivername="postgresql").render_as_string(hide_password=False)
            try:
                psycopg.connect(plain, connect_timeout=5).close()
            except psycopg.OperationalError:
                return False
            return True

        service = Service.begun(begin, answers)
        try:
            yield pooled.render_as_string(hide_password=False)
        finally:
            service.running.stop()


def installed() -> str | None:
    """Return the path of the pgbouncer of this machine, or None."""
    return shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


if __name__ == "__main__":
    if installed() is None:
        debian.install("pgbouncer")
