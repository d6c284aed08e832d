"""Fixtures for every test: real services, a real browser, the real model's layout; and limits for every test.

Services start for the first test that requests them and end with the run. A missing one fails that test.
"""

import ipaddress
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from playwright.sync_api import Browser, Page

from tests.services import browser as browsers
from tests.services import postgres as postgres_server
from tests.services import redis as redis_server
from tests.services import s3 as s3_server
from tests.services.postgres import Postgres
from tests.services.redis import Redis
from tests.services.s3 import S3, Bucket

TREE = Path(__file__).resolve().parent.parent
LAYOUT = "ZIMAGE_LAYOUT_DIR"


def pytest_configure(config: pytest.Config) -> None:
    """Hide the settings of the environment from the tests, and block connections to other hosts."""
    for name in [name for name in os.environ if name.startswith("ZIMAGE_")]:
        if not name.startswith("ZIMAGE_TEST_") and name != LAYOUT:
            del os.environ[name]
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "localhost,127.0.0.1,::1"
    sys.addaudithook(_refuse_other_hosts)
    # How fast an example runs depends on the machine, so only its result is checked.
    settings.register_profile("zimage", deadline=None, print_blob=True)
    settings.load_profile("zimage")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests of the GPU if there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no NVIDIA GPU here")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The PostgreSQL server."""
    with postgres_server.running() as server:
        yield server


@pytest.fixture(scope="session")
def migrated_template(postgres: Postgres) -> Iterator[str]:
    """The name of a PostgreSQL database at the newest revision. Copy it; never connect to it."""
    with postgres.database() as url:
        migrate(url)
        yield url.rpartition("/")[2]


@pytest.fixture
def database_url(postgres: Postgres, migrated_template: str) -> Iterator[str]:
    """A PostgreSQL database for this test alone, at the newest revision."""
    with postgres.database(migrated_template) as url:
        yield url


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file at the newest revision. Copy it."""
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture
def sqlite_url(migrated_file: Path, tmp_path: Path) -> str:
    """An SQLite database for this test alone, at the newest revision."""
    return f"sqlite:///{shutil.copy(migrated_file, tmp_path / 'zimage.db')}"


@pytest.fixture(params=["sqlite_url", "database_url"], ids=["sqlite", "postgresql"])
def each_database_url(request: pytest.FixtureRequest) -> str:
    """A migrated database; the test runs once on SQLite and once on PostgreSQL."""
    return str(request.getfixturevalue(request.param))


@pytest.fixture(scope="session")
def redis() -> Iterator[Redis]:
    """The Redis server."""
    with redis_server.running() as server:
        yield server


@pytest.fixture
def redis_url(redis: Redis) -> str:
    """An empty Redis database."""
    redis.flush()
    return redis.url


@pytest.fixture(scope="session")
def s3_service() -> Iterator[S3]:
    """The S3-compatible server."""
    with s3_server.running() as server:
        yield server


@pytest.fixture
def s3(s3_service: S3) -> Iterator[Bucket]:
    """An empty bucket for this test alone."""
    with s3_service.bucket() as bucket:
        yield bucket


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser that the tests of a file share."""
    with browsers.running() as started:
        yield started


@pytest.fixture
def browser_page(browser: Browser) -> Iterator[Page]:
    """A new page without cookies or history."""
    with browsers.page(browser) as page:
        yield page


@pytest.fixture(scope="session")
def layout_dir() -> Path:
    """The real model's folder without its weights."""
    folder = Path(os.environ.get(LAYOUT) or TREE.parent / "shared" / "z-image-turbo")
    if not folder.is_dir():
        missing = f"{folder} does not exist; set {LAYOUT} to the folder of the real model's layout"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    return folder


def migrate(url: str) -> None:
    """Upgrade a database to the newest revision, with the command that an operator uses."""
    command = [sys.executable, "-m", "alembic", "-x", f"url={url}", "upgrade", "head"]
    migration = subprocess.run(command, cwd=TREE, capture_output=True, text=True)
    assert migration.returncode == 0, migration.stderr


def _refuse_other_hosts(event: str, arguments: tuple[object, ...]) -> None:
    """Audit hook (PEP 578): raise on a connection to another host, unless the run uses services of its environment."""
    if event != "socket.connect":
        return
    address = arguments[1]
    if not isinstance(address, tuple) or _is_local(str(address[0])):
        return
    if not any(name.startswith("ZIMAGE_TEST_") for name in os.environ):
        raise PermissionError(f"a test tried to reach {address[0]}")


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
