"""Both kinds of storage, as the product opens them."""

from pathlib import Path

import pytest

from tests.services.s3 import Bucket
from zcore.settings import StorageSettings
from zcore.storage import BucketStorage, DirectoryStorage, Storage

PUBLIC_URL = "http://127.0.0.1:8000"


def bucket_settings(s3: Bucket, **changed: object) -> StorageSettings:
    """As an operator would write them."""
    fields: dict[str, object] = {
        "bucket": s3.name,
        "endpoint_url": s3.endpoint_url,
        "access_key_id": s3.access_key_id,
        "secret_access_key": s3.secret_access_key,
        "region": s3.region,
        "link_expiry_s": 60,
    }
    return StorageSettings(**{**fields, **changed})  # type: ignore[arg-type]


@pytest.fixture
def bucket(s3: Bucket) -> BucketStorage:
    """Pictures in a bucket."""
    return BucketStorage(bucket_settings(s3))


@pytest.fixture
def directory(tmp_path: Path) -> DirectoryStorage:
    """Pictures in a folder."""
    storage = DirectoryStorage(tmp_path / "storage", PUBLIC_URL, "a key of this test", link_expiry_s=60)
    storage.prepare()
    return storage


@pytest.fixture(params=["directory", "bucket"])
def storage(request: pytest.FixtureRequest) -> Storage:
    """The test runs once on each kind."""
    opened: Storage = request.getfixturevalue(request.param)
    return opened
