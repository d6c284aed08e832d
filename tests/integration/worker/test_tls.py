"""Input images over https: fetched only from servers that a known authority certifies under the requested name."""

import io
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from tests.services.tls import HOST, Authority, HttpsServer, https_server, resolve_host, trust_only
from worker.inputs.fetch import InputSource
from worker.patient_storage import PatientStorage
from zcore.errors import InputUnavailable
from zcore.imaging.generation_inputs import Inputs
from zcore.jobs.database import Database
from zcore.request import GenerationRequest, RequestLimits
from zcore.settings import WebhooksSettings
from zcore.storage import DirectoryStorage

TEAL = (0, 128, 128)


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """The only authority that the worker trusts."""
    authority = Authority(tmp_path, "trusted")
    resolve_host(monkeypatch)
    trust_only(monkeypatch, authority)
    return authority


@pytest.fixture
def database(sqlite_url: str) -> Iterator[Database]:
    with closing(Database(sqlite_url)) as opened:
        yield opened


@pytest.fixture
def source(authority: Authority, database: Database, tmp_path: Path) -> InputSource:
    """Where a worker gets its inputs from, private addresses allowed because the test's server has one."""
    storage = DirectoryStorage(tmp_path / "storage", "http://127.0.0.1:8000", "key", link_expiry_s=60)
    return InputSource(
        database,
        PatientStorage(storage, patience_s=0, on_return=lambda: None),
        WebhooksSettings(timeout_s=5.0, allow_private_addresses=True),
        RequestLimits(max_input_bytes=10_000),
    )


def image_file() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (48, 32), TEAL).save(content, "png")
    return content.getvalue()


def fetched(source: InputSource, server: HttpsServer) -> Inputs:
    request = GenerationRequest(prompt="a fox", image=f"https://{HOST}:{server.port}/fox.png")
    return source.fetch(request, "anna", lambda: None, lambda _step: None).inputs


def test_an_image_is_fetched_from_the_name_in_its_address(authority: Authority, source: InputSource) -> None:
    with https_server(authority.server_context(HOST), image_file()) as server:
        image = fetched(source, server).image
    assert image is not None
    assert image.getpixel((0, 0)) == TEAL
    assert server.names == [HOST], "SNI carries the name although the connection is to an address"


def test_a_server_of_an_unknown_authority_is_never_asked(source: InputSource, tmp_path: Path) -> None:
    context = Authority(tmp_path, "unknown").server_context(HOST)
    with https_server(context, image_file()) as server, pytest.raises(InputUnavailable) as raised:
        fetched(source, server)
    assert raised.value.retryable, "certificates expire and are renewed"
    assert server.bodies == []


def test_a_server_certified_under_another_name_is_never_asked(authority: Authority, source: InputSource) -> None:
    context = authority.server_context("other.example")
    with https_server(context, image_file()) as server, pytest.raises(InputUnavailable):
        fetched(source, server)
    assert server.bodies == []
