"""Storage in a real S3-compatible server: presigned links and failures."""

from collections.abc import Iterator
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import httpx
import pytest

from tests.integration.broker.tcp_proxy import TcpProxy, proxy_to
from tests.integration.storage.conftest import bucket_settings
from tests.services.s3 import Bucket
from tests.waiting import wait_until
from zcore.errors import ConfigurationError, StorageError
from zcore.storage import BucketStorage

KEY = "jobs/0192/1-0.png"
NAME = "0192-0.png"
IMAGE = b"\x89PNG" + bytes(10_000)


@pytest.fixture
def cable(s3: Bucket) -> Iterator[TcpProxy]:
    """Proxy to the S3 server that can be cut."""
    port = urlsplit(s3.endpoint_url).port
    assert port is not None
    with proxy_to(port) as plugged:
        yield plugged


def test_a_link_returns_the_object_without_credentials(bucket: BucketStorage) -> None:
    bucket.put(KEY, IMAGE, "image/png")
    answer = httpx.get(bucket.link(KEY, NAME).url)
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, IMAGE, "image/png")


def test_a_proxy_of_the_environment_is_not_asked_about_a_server_of_this_host(
    s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    storage = BucketStorage(bucket_settings(s3))
    storage.put(KEY, IMAGE, "image/png")
    assert storage.get(KEY) == IMAGE


def test_without_the_signature_access_is_denied(bucket: BucketStorage) -> None:
    bucket.put(KEY, IMAGE, "image/png")
    assert httpx.get(bucket.link(KEY, NAME).url.partition("?")[0]).status_code == 403


def test_a_link_gives_access_to_one_object_only(bucket: BucketStorage) -> None:
    bucket.put(KEY, IMAGE, "image/png")
    bucket.put("jobs/other/1-0.png", b"other content", "image/png")
    assert httpx.get(bucket.link(KEY, NAME).url.replace("0192", "other")).status_code == 403


def test_the_expiry_of_a_link_cannot_be_changed(s3: Bucket, bucket: BucketStorage) -> None:
    bucket.put(KEY, IMAGE, "image/png")
    url = bucket.link(KEY, NAME).url
    assert parse_qs(urlsplit(url).query)["X-Amz-Expires"] == ["75"]
    assert httpx.get(url.replace("X-Amz-Expires=75", "X-Amz-Expires=7500")).status_code == 403


def test_a_link_expires(s3: Bucket) -> None:
    bucket = BucketStorage(bucket_settings(s3, link_expiry_s=1))
    bucket.put(KEY, IMAGE, "image/png")
    url = bucket.link(KEY, NAME).url
    wait_until(lambda: httpx.get(url).status_code == 403, timeout_s=10, every_s=0.2)


def test_links_use_the_public_endpoint(s3: Bucket) -> None:
    bucket = BucketStorage(bucket_settings(s3, public_endpoint_url="https://images.example"))
    assert bucket.link(KEY, NAME).url.startswith(f"https://images.example/{s3.name}/{KEY}?")


def test_a_missing_bucket_is_created(s3: Bucket) -> None:
    name = f"test-{uuid4().hex}"
    bucket = BucketStorage(bucket_settings(s3, bucket=name))
    bucket.prepare()
    try:
        bucket.put(KEY, IMAGE, "image/png")
        assert bucket.get(KEY) == IMAGE
        bucket.delete([KEY])
    finally:
        with s3.client() as client:
            client.delete_bucket(Bucket=name)


def test_a_bucket_that_was_deleted_is_a_storage_error_and_not_a_missing_object(s3: Bucket) -> None:
    bucket = BucketStorage(bucket_settings(s3, bucket="never-created"))
    with pytest.raises(StorageError, match="NoSuchBucket"):
        bucket.put(KEY, IMAGE, "image/png")


def test_a_wrong_secret_is_a_configuration_error_at_start(s3: Bucket) -> None:
    bucket = BucketStorage(bucket_settings(s3, secret_access_key="wrong"))
    with pytest.raises(ConfigurationError, match="secret_access_key: do not give access to bucket"):
        bucket.prepare()


def test_a_wrong_secret_later_is_a_storage_error(s3: Bucket) -> None:
    with pytest.raises(StorageError, match=KEY):
        BucketStorage(bucket_settings(s3, secret_access_key="wrong")).put(KEY, IMAGE, "image/png")


@pytest.mark.timeout(60)
def test_an_unreachable_endpoint_is_a_storage_error_for_every_method(s3: Bucket, cable: TcpProxy) -> None:
    bucket = BucketStorage(bucket_settings(s3, endpoint_url=f"http://127.0.0.1:{cable.port}"))
    bucket.put(KEY, IMAGE, "image/png")
    cable.cut()
    for method in (lambda: bucket.put(KEY, IMAGE, "image/png"), lambda: bucket.delete([KEY]), bucket.prepare):
        with pytest.raises(StorageError):
            method()
    assert bucket.link(KEY, NAME).url, "a link requires no connection"


def test_an_interrupted_put_stores_nothing(s3: Bucket, cable: TcpProxy) -> None:
    """The connection ends in the middle of the body at every attempt of the client."""
    bucket = BucketStorage(bucket_settings(s3, endpoint_url=f"http://127.0.0.1:{cable.port}"))
    cable.break_after(200_000)
    with pytest.raises(StorageError):
        bucket.put(KEY, bytes(8_000_000), "image/png")
    with s3.client() as client:
        assert client.list_objects_v2(Bucket=s3.name)["KeyCount"] == 0
