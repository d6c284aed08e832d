"""A bucket behind https, as production demands it: its certificate is checked before anything is sent."""

import ssl
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.integration.storage.conftest import bucket_settings
from tests.services.s3 import Bucket
from tests.services.tls import Authority, TlsEndpoint, tls_in_front_of
from zcore.errors import StorageError
from zcore.storage import BucketStorage

KEY = "jobs/0192/1-0.png"
NAME = "0192-0.png"
CONTENT = b"\x89PNG" + bytes(10_000)

Serve = Callable[[Authority, str], AbstractContextManager[TlsEndpoint]]


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """The authority that the environment names, as an operator would."""
    authority = Authority(tmp_path, "trusted")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.certificate))
    return authority


@pytest.fixture
def serve(s3: Bucket) -> Serve:
    """Serves the store behind TLS, with a certificate of an authority for a name."""
    port = urlsplit(s3.endpoint_url).port
    assert port is not None
    return lambda authority, host: tls_in_front_of(port, authority.server_context(host))


def storage_at(s3: Bucket, endpoint: TlsEndpoint) -> BucketStorage:
    return BucketStorage(bucket_settings(s3, endpoint_url=f"https://localhost:{endpoint.port}"))


def test_objects_are_stored_read_and_linked_over_tls(s3: Bucket, authority: Authority, serve: Serve) -> None:
    with serve(authority, "localhost") as endpoint:
        storage = storage_at(s3, endpoint)
        storage.prepare()
        storage.put(KEY, CONTENT, "image/png")
        assert storage.get(KEY) == CONTENT
        link = storage.link(KEY, NAME).url
        assert link.startswith(f"https://localhost:{endpoint.port}/")
        trusting = ssl.create_default_context(cafile=authority.certificate)
        assert httpx.get(link, verify=trusting).content == CONTENT
        storage.delete([KEY])
    assert set(endpoint.names) == {"localhost"}


@pytest.mark.parametrize(("issuer", "host"), [("unknown", "localhost"), ("trusted", "other.example")])
def test_a_certificate_that_cannot_be_trusted_is_a_storage_error_for_every_operation(
    s3: Bucket, authority: Authority, serve: Serve, tmp_path: Path, issuer: str, host: str
) -> None:
    stranger = Authority(tmp_path, "unknown")
    with serve(authority if issuer == "trusted" else stranger, host) as endpoint:
        storage = storage_at(s3, endpoint)
        operations = (
            storage.prepare,
            lambda: storage.put(KEY, CONTENT, "image/png"),
            lambda: storage.get(KEY),
            lambda: storage.delete([KEY]),
        )
        for operation in operations:
            with pytest.raises(StorageError, match="SSL validation failed"):
                operation()
    with s3.client() as client:
        assert client.list_objects_v2(Bucket=s3.name)["KeyCount"] == 0
