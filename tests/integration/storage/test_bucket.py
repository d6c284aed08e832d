"""Pictures in a real S3-compatible server: links without a key, and what goes wrong."""

from collections.abc import Iterator
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import httpx
import pytest

from tests.integration.broker.cable import Cable, cable_to
from tests.integration.storage.conftest import bucket_settings
from tests.services.s3 import Bucket
from tests.waiting import wait_until
from zcore.errors import ConfigurationError, StorageError
from zcore.storage import BucketStorage

KEY = "jobs/0192/1-0.png"
PICTURE = b"\x89PNG" + bytes(10_000)


@pytest.fixture
def cable(s3: Bucket) -> Iterator[Cable]:
    """A cable to the S3 server."""
    port = urlsplit(s3.endpoint_url).port
    assert port is not None
    with cable_to(port) as plugged:
        yield plugged


def test_a_link_gives_the_picture_without_a_key(bucket: BucketStorage) -> None:
    bucket.put(KEY, PICTURE, "image/png")
    answer = httpx.get(bucket.link(KEY).url)
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, PICTURE, "image/png")


def test_without_the_signature_there_is_no_picture(bucket: BucketStorage) -> None:
    bucket.put(KEY, PICTURE, "image/png")
    assert httpx.get(bucket.link(KEY).url.partition("?")[0]).status_code == 403


def test_a_link_of_one_picture_does_not_open_another(bucket: BucketStorage) -> None:
    bucket.put(KEY, PICTURE, "image/png")
    bucket.put("jobs/other/1-0.png", b"another's", "image/png")
    assert httpx.get(bucket.link(KEY).url.replace("0192", "other")).status_code == 403


def test_a_link_cannot_be_made_to_last_longer(s3: Bucket, bucket: BucketStorage) -> None:
    bucket.put(KEY, PICTURE, "image/png")
    url = bucket.link(KEY).url
    assert parse_qs(urlsplit(url).query)["X-Amz-Expires"] == ["60"]
    assert httpx.get(url.replace("X-Amz-Expires=60", "X-Amz-Expires=6000")).status_code == 403


def test_a_link_ends(s3: Bucket) -> None:
    bucket = BucketStorage(bucket_settings(s3, link_expiry_s=1))
    bucket.put(KEY, PICTURE, "image/png")
    url = bucket.link(KEY).url
    wait_until(lambda: httpx.get(url).status_code == 403, timeout_s=10, every_s=0.2)


def test_links_lead_to_the_public_address(s3: Bucket) -> None:
    bucket = BucketStorage(bucket_settings(s3, public_endpoint_url="https://pictures.example"))
    assert bucket.link(KEY).url.startswith(f"https://pictures.example/{s3.name}/{KEY}?")


def test_a_bucket_that_is_not_there_is_made(s3: Bucket) -> None:
    name = f"test-{uuid4().hex}"
    bucket = BucketStorage(bucket_settings(s3, bucket=name))
    bucket.prepare()
    try:
        bucket.put(KEY, PICTURE, "image/png")
        assert bucket.get(KEY) == PICTURE
        bucket.delete([KEY])
    finally:
        with s3.client() as client:
            client.delete_bucket(Bucket=name)


def test_a_bucket_that_vanished_is_a_fault_of_the_store_and_not_of_the_picture(s3: Bucket) -> None:
    bucket = BucketStorage(bucket_settings(s3, bucket="never-made"))
    with pytest.raises(StorageError, match="NoSuchBucket"):
        bucket.put(KEY, PICTURE, "image/png")


def test_a_wrong_secret_is_named_at_start(s3: Bucket) -> None:
    bucket = BucketStorage(bucket_settings(s3, secret_access_key="wrong"))
    with pytest.raises(ConfigurationError, match="secret_access_key: give no access to bucket"):
        bucket.prepare()


def test_a_wrong_secret_later_is_a_storage_error(s3: Bucket) -> None:
    with pytest.raises(StorageError, match=KEY):
        BucketStorage(bucket_settings(s3, secret_access_key="wrong")).put(KEY, PICTURE, "image/png")


@pytest.mark.timeout(60)
def test_a_dead_endpoint_is_a_storage_error_for_every_verb(s3: Bucket, cable: Cable) -> None:
    bucket = BucketStorage(bucket_settings(s3, endpoint_url=f"http://127.0.0.1:{cable.port}"))
    bucket.put(KEY, PICTURE, "image/png")
    cable.cut()
    for verb in (lambda: bucket.put(KEY, PICTURE, "image/png"), lambda: bucket.delete([KEY]), bucket.prepare):
        with pytest.raises(StorageError):
            verb()
    assert bucket.link(KEY).url, "links need no connection"


def test_a_put_that_breaks_half_way_leaves_nothing(s3: Bucket, cable: Cable) -> None:
    """The connection ends in the middle of the body, each time the client tries."""
    bucket = BucketStorage(bucket_settings(s3, endpoint_url=f"http://127.0.0.1:{cable.port}"))
    cable.break_after(200_000)
    with pytest.raises(StorageError):
        bucket.put(KEY, bytes(8_000_000), "image/png")
    with s3.client() as client:
        assert client.list_objects_v2(Bucket=s3.name)["KeyCount"] == 0
