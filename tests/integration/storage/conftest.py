"""Fixtures of both kinds of storage."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.installation import Installation, Server
from tests.services.odd_stores import BUCKET, IgnorantStore, OddStore, StrictStore, serving
from tests.services.s3 import Bucket
from tests.services.tls import Authority
from zcore.settings import StorageSettings
from zcore.storage import BucketStorage, DirectoryStorage, Storage

PUBLIC_URL = "http://127.0.0.1:8000"


def bucket_settings(s3: Bucket, **changes: object) -> StorageSettings:
    """Settings of a bucket, as an operator would write them."""
    fields: dict[str, object] = {
        "bucket": s3.name,
        "endpoint_url": s3.endpoint_url,
        "access_key_id": s3.access_key_id,
        "secret_access_key": s3.secret_access_key,
        "region": s3.region,
        "link_expiry_s": 60,
    }
    return StorageSettings(**{**fields, **changes})


@pytest.fixture
def bucket(s3: Bucket) -> BucketStorage:
    """Storage in a bucket."""
    return BucketStorage(bucket_settings(s3))


@pytest.fixture
def directory(tmp_path: Path) -> DirectoryStorage:
    """Storage in a directory."""
    storage = DirectoryStorage(tmp_path / "storage", PUBLIC_URL, "a key of this test", link_expiry_s=60)
    storage.prepare()
    return storage


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running API whose storage is a directory."""
    installation = Installation(tmp_path_factory.mktemp("served"), {"storage.link_key": "a key of this test"})
    with installation.serving() as started:
        yield started


@pytest.fixture
def served(server: Server) -> DirectoryStorage:
    """The storage directory of the server."""
    return DirectoryStorage(server.running.log.parent / "storage", server.url, "a key of this test", link_expiry_s=60)


@pytest.fixture(scope="session")
def store_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority of the certificates of the https stores."""
    return Authority(tmp_path_factory.mktemp("authority"), "stores")


@pytest.fixture
def strict_store(
    store_authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[StrictStore, BucketStorage]]:
    """A store that refuses what it does not know, over https, and the storage in it."""
    store = StrictStore()
    with _storage_in(store, store_authority, monkeypatch) as storage:
        yield store, storage


@pytest.fixture
def ignorant_store(
    store_authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[IgnorantStore, BucketStorage]]:
    """A store that believes every body, over https, and the storage in it."""
    store = IgnorantStore()
    with _storage_in(store, store_authority, monkeypatch) as storage:
        yield store, storage


@pytest.fixture
def strict(strict_store: tuple[StrictStore, BucketStorage]) -> BucketStorage:
    """Storage in a store that refuses what it does not know."""
    return strict_store[1]


@pytest.fixture
def ignorant(ignorant_store: tuple[IgnorantStore, BucketStorage]) -> BucketStorage:
    """Storage in a store that believes every body."""
    return ignorant_store[1]


@pytest.fixture(params=["directory", "bucket", "strict", "ignorant"])
def storage(request: pytest.FixtureRequest) -> Storage:
    """Storage of every kind; a test runs once with each."""
    opened: Storage = request.getfixturevalue(request.param)
    return opened


@contextmanager
def _storage_in(store: OddStore, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketStorage]:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.certificate))
    with serving(store, authority.server_context("localhost")) as endpoint_url:
        yield BucketStorage(
            StorageSettings(
                bucket=BUCKET,
                endpoint_url=endpoint_url,
                access_key_id="key",
                secret_access_key="a/b+c=d",
                link_expiry_s=60,
            )
        )
