"""The services that other tests use are real, empty at the start, and gone at the end."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psycopg
import pytest
from playwright.sync_api import Page
from redis import Redis as RedisClient

from tests.services.postgres import Postgres
from tests.services.redis import Redis
from tests.services.s3 import Bucket
from tests.waiting import wait_until

TREE = Path(__file__).resolve().parents[2]

START_ALL_AND_WAIT = """
import signal, sys
from tests.services import postgres, redis, s3
with postgres.running() as one, redis.running() as two, s3.running() as three:
    print(one.url.port, two.url.rpartition(':')[2].partition('/')[0], three.endpoint_url.rpartition(':')[2], flush=True)
    signal.pause()
"""


def test_a_database_is_removed_after_its_test(postgres: Postgres) -> None:
    with postgres.database() as url:
        plain = url.replace("postgresql+psycopg", "postgresql")
        with psycopg.connect(plain) as connection:
            found = connection.execute("SELECT count(*) FROM information_schema.tables WHERE table_schema = 'public'")
            assert found.fetchone() == (0,)
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        psycopg.connect(plain)


def test_a_migrated_database_is_a_private_copy(database_url: str, postgres: Postgres) -> None:
    with psycopg.connect(database_url.replace("postgresql+psycopg", "postgresql")) as connection:
        version = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    assert version is not None
    assert database_url != postgres.url.render_as_string(hide_password=False)


def test_redis_is_empty_for_every_test(redis: Redis, redis_url: str) -> None:
    with RedisClient.from_url(redis_url) as client:
        client.set("left", "over")
        redis.flush()
        assert client.dbsize() == 0


def test_a_bucket_stores_objects_and_serves_them_only_by_signed_links(s3: Bucket) -> None:
    with s3.client() as client:
        client.put_object(Bucket=s3.name, Key="a/image", Body=b"pixels")
        link = client.generate_presigned_url("get_object", {"Bucket": s3.name, "Key": "a/image"}, ExpiresIn=60)
    assert httpx.get(link).content == b"pixels"
    assert httpx.get(link.replace("X-Amz-Signature=", "X-Amz-Signature=0")).status_code == 403
    assert httpx.get(f"{s3.endpoint_url}/{s3.name}/a/image").status_code == 403


def test_the_browser_runs_scripts_and_reaches_no_other_host(browser_page: Page) -> None:
    browser_page.set_content("<p>before</p><script>document.querySelector('p').textContent = 'after'</script>")
    assert browser_page.inner_text("p") == "after"
    with pytest.raises(Exception, match="ERR_NAME_NOT_RESOLVED"):
        browser_page.goto("http://example.com/")


def test_no_test_can_connect_to_another_host() -> None:
    with pytest.raises(PermissionError, match=r"tried to reach 192\.0\.2\.1"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)


@pytest.fixture
def open_folder() -> Iterator[str]:
    """A folder for temporary files that other accounts can read too, as PostgreSQL needs under root."""
    with tempfile.TemporaryDirectory(prefix="zimage-killed-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        yield folder


def test_the_services_end_with_the_run_even_if_it_is_killed(open_folder: str) -> None:
    if any(name.startswith("ZIMAGE_TEST_") for name in os.environ):
        pytest.skip("this run uses services that it did not start")
    environment = {**os.environ, "PYTHONPATH": str(TREE), "TMPDIR": open_folder}
    command = [sys.executable, "-c", START_ALL_AND_WAIT]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        ports = [int(port) for port in run.stdout.readline().split()]
        assert len(ports) == 3
        assert all(_listens(port) for port in ports)
        run.send_signal(signal.SIGKILL)

    def all_are_gone() -> bool:
        return not any(_listens(port) for port in ports)

    wait_until(all_are_gone)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except ConnectionRefusedError:
        return False
    return True
