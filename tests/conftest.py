"""What every test may ask for: real services, a real browser, the real model's layout; and what none may do.

Services start on the first test that asks and end with the run. A missing one fails the test that asked.
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
    """No test sees the settings of whoever runs it, or reaches beyond this machine."""
    for name in [name for name in os.environ if name.startswith("ZIMAGE_")]:
        if not name.startswith("ZIMAGE_TEST_") and name != LAYOUT:
            del os.environ[name]
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.addaudithook(_refuse_other_hosts)
    # How fast an example runs depends on the machine; only what it answers is judged.
    settings.register_profile("zimage", deadline=None, print_blob=True)
    settings.load_profile("zimage")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests of the GPU are skipped where there is none."""
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
    """The name of a PostgreSQL database at the newest revision, which nobody connects to: copy it."""
    with postgres.database() as url:
        migrate(url)
        yield url.rpartition("/")[2]


@pytest.fixture
def database_url(postgres: Postgres, migrated_template: str) -> Iterator[str]:
    """A PostgreSQL database of this test alone, at the newest revision."""
    with postgres.database(migrated_template) as url:
        yield url


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file at the newest revision: copy it."""
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture
def sqlite_url(migrated_file: Path, tmp_path: Path) -> str:
    """An SQLite database of this test alone, at the newest revision."""
    return f"sqlite:///{shutil.copy(migrated_file, tmp_path / 'zimage.db')}"


@pytest.fixture(params=["sqlite_url", "database_url"], ids=["sqlite", "postgresql"])
def each_database_url(request: pytest.FixtureRequest) -> str:
    """The test runs once on SQLite and once on PostgreSQL."""
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
    """An empty bucket of this test alone."""
    with s3_service.bucket() as bucket:
        yield bucket


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The browser of this file's tests."""
    with browsers.running() as started:
        yield started


@pytest.fixture
def browser_page(browser: Browser) -> Iterator[Page]:
    """A page that nobody has used before."""
    with browsers.page(browser) as page:
        yield page


@pytest.fixture(scope="session")
def layout_dir() -> Path:
    """The real model's folder without its weights."""
    folder = Path(os.environ.get(LAYOUT) or TREE.parent / "shared" / "z-image-turbo")
    if not folder.is_dir():
        lacking = f"{folder} is not there; {LAYOUT} names the real model's layout"
        pytest.fail(lacking) if os.environ.get("CI") else pytest.skip(lacking)
    return folder


def migrate(url: str) -> None:
    """Bring a database to the newest revision, as an operator does."""
    command = [sys.executable, "-m", "alembic", "-x", f"url={url}", "upgrade", "head"]
    migration = subprocess.run(command, cwd=TREE, capture_output=True, text=True)
    assert migration.returncode == 0, migration.stderr


def _refuse_other_hosts(event: str, arguments: tuple[object, ...]) -> None:
    """An audit hook (PEP 578): connecting beyond this machine, except to services the run was given, is an error."""
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
