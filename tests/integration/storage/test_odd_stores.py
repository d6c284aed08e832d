"""What reaches stores over https that are neither AWS nor SeaweedFS, and what happens if a store damages objects."""

import base64
import hashlib
import ssl

import httpx
import pytest

from tests.services.odd_stores import IgnorantStore, StrictStore
from tests.services.tls import Authority
from zcore.errors import ConfigurationError, StorageError
from zcore.settings import StorageSettings
from zcore.storage import BucketStorage

KEY = "jobs/0192/1-0.png"
NAME = "0192-0.png"
CONTENT = b"\x89PNG" + bytes(10_000)

Strict = tuple[StrictStore, BucketStorage]
Ignorant = tuple[IgnorantStore, BucketStorage]


@pytest.mark.parametrize("fixture", ["strict_store", "ignorant_store"])
def test_a_body_is_sent_plain_with_its_md5(fixture: str, request: pytest.FixtureRequest) -> None:
    store, storage = request.getfixturevalue(fixture)
    storage.put(KEY, CONTENT, "image/png")
    (sent,) = [received for received in store.received if received.method == "PUT"]
    assert sent.body == CONTENT == store.objects[KEY].content
    assert not {"content-encoding", "x-amz-trailer", "x-amz-sdk-checksum-algorithm", "transfer-encoding"} & set(
        sent.headers
    )
    assert sent.headers["content-md5"] == base64.b64encode(hashlib.md5(CONTENT).digest()).decode()
    assert sent.headers["content-type"] == "image/png"


def test_an_etag_that_is_the_md5_verifies_an_object_without_another_request(strict_store: Strict) -> None:
    store, storage = strict_store
    storage.put(KEY, CONTENT, "image/png")
    assert [received.method for received in store.received] == ["PUT"]


def test_with_another_etag_the_size_verifies_an_object(ignorant_store: Ignorant) -> None:
    store, storage = ignorant_store
    storage.put(KEY, CONTENT, "image/png")
    assert [received.method for received in store.received] == ["PUT", "HEAD"]


def test_an_object_that_the_store_damages_is_an_error_and_is_removed(ignorant_store: Ignorant) -> None:
    store, storage = ignorant_store
    store.damage = lambda content: content[:5000]
    with pytest.raises(StorageError, match=r"^jobs/0192/1-0.png: .* 10004 bytes were sent, 5000 are stored$") as failed:
        storage.put(KEY, CONTENT, "image/png")
    assert failed.value.retryable
    assert store.objects == {}


def test_an_object_that_the_store_loses_is_an_error(ignorant_store: Ignorant) -> None:
    store, storage = ignorant_store
    store.damage = lambda _content: None
    with pytest.raises(StorageError, match="accepted the object but does not have it"):
        storage.put(KEY, CONTENT, "image/png")


def test_keys_that_may_do_nothing_with_the_bucket_itself_are_enough(strict_store: Strict) -> None:
    store, storage = strict_store
    storage.prepare()
    storage.put(KEY, CONTENT, "image/png")
    assert storage.get(KEY) == CONTENT
    storage.delete([KEY, "jobs/0192/1-1.png"])
    assert store.objects == {}
    assert all(received.path.count("/") > 1 for received in store.received), "every request names an object"


def test_a_missing_bucket_that_the_keys_may_not_create_is_a_configuration_error(
    strict_store: Strict, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, storage = strict_store
    monkeypatch.setattr(storage, "_bucket", "another")
    with pytest.raises(ConfigurationError, match=r"^storage.bucket: there is no bucket another, .* may not create it"):
        storage.prepare()


@pytest.mark.parametrize("fixture", ["strict_store", "ignorant_store"])
def test_a_link_works_without_credentials_and_names_the_file(
    fixture: str, request: pytest.FixtureRequest, store_authority: Authority
) -> None:
    _, storage = request.getfixturevalue(fixture)
    storage.put(KEY, CONTENT, "image/png")
    link = storage.link(KEY, NAME)
    trusting = ssl.create_default_context(cafile=store_authority.certificate)
    with httpx.Client(verify=trusting) as client:
        answers = [client.get(url) for url in (link.url, link.download_url)]
        assert [answer.content for answer in answers] == [CONTENT] * 2
        assert [answer.headers["content-disposition"] for answer in answers] == [
            f'inline; filename="{NAME}"',
            f'attachment; filename="{NAME}"',
        ]
        expired = link.url.replace("X-Amz-Expires=75", "X-Amz-Expires=0")
        assert client.get(expired).status_code == 403


def test_a_link_is_signed_with_the_token_of_temporary_credentials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without keys in the settings, the AWS client finds credentials, such as those of an instance's role."""
    for name, value in (("ACCESS_KEY_ID", "temporary"), ("SECRET_ACCESS_KEY", "s"), ("SESSION_TOKEN", "a-token")):
        monkeypatch.setenv(f"AWS_{name}", value)
    storage = BucketStorage(StorageSettings(bucket="images", addressing_style="virtual", region="eu-central-1"))
    url = storage.link(KEY, NAME).url
    assert url.startswith(f"https://images.s3.eu-central-1.amazonaws.com/{KEY}?")
    assert "X-Amz-Security-Token=a-token" in url
    assert "X-Amz-Credential=temporary%2F" in url
