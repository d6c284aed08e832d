"""Who may call without a key: this machine's user, not a proxy, not a page of another site, not another user."""

import os
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from litestar.testing import TestClient

from server import keyless
from server.app import create_app
from tests.integration.api.conftest import Api, problem
from tests.integration.installation import Installation
from zcore.errors import ConfigurationError
from zcore.keys import load_keys
from zcore.settings import load_settings


def raw(api: Api, head: str, body: str = "") -> str:
    """Send a request byte for byte and return its response; `PORT` in the head is the server's port."""
    port = urlsplit(api.url).port
    assert port is not None
    text = head.strip().replace("PORT", str(port)).replace("\n", "\r\n")
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(f"{text}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


@pytest.mark.parametrize(
    "head",
    [
        "GET /api/jobs HTTP/1.1\nHost: 127.0.0.1:PORT",
        "GET /api/jobs HTTP/1.1\nHost: LOCALHOST:PORT\nUser-Agent: curl/8",
        "GET /api/jobs HTTP/1.1\nHost: [::1]:PORT",
        "GET /api/jobs HTTP/1.1\nHost: localhost:PORT\nOrigin: http://localhost:PORT\nSec-Fetch-Site: same-origin",
        "GET /api/jobs HTTP/1.1\nHost: localhost:PORT\nSec-Fetch-Site: none",
    ],
)
def test_a_direct_request_of_this_user_is_accepted(open_api: Api, head: str) -> None:
    assert raw(open_api, head).startswith("HTTP/1.1 200 ")


NGINX = {
    "by default": "GET /api/jobs HTTP/1.0\nHost: 127.0.0.1:PORT\nUser-Agent: curl/8",
    "with HTTP/1.1 and X-Real-IP": "GET /api/jobs HTTP/1.1\nHost: 127.0.0.1:PORT\nX-Real-IP: 203.0.113.7",
    "with Host passed on": "GET /api/jobs HTTP/1.1\nHost: images.example",
    "with Host passed on, which the client chose": "GET /api/jobs HTTP/1.1\nHost: localhost",
    "with Host passed on and X-Real-IP": "GET /api/jobs HTTP/1.1\nHost: localhost:PORT\nX-Real-IP: 203.0.113.7",
    "with X-Forwarded-For": "GET /api/jobs HTTP/1.1\nHost: 127.0.0.1:PORT\nX-Forwarded-For: 127.0.0.1",
}
OTHER_PROXIES = [
    f"GET /api/jobs HTTP/1.1\nHost: 127.0.0.1:PORT\n{header}: {value}"
    for header, value in {
        "Forwarded": "for=127.0.0.1",
        "Via": "1.1 proxy",
        "X-Forwarded-Host": "images.example",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Ssl": "on",
        "CF-Connecting-IP": "203.0.113.7",
        "True-Client-IP": "203.0.113.7",
        "X-Client-IP": "",
    }.items()
]


@pytest.mark.parametrize("head", NGINX.values(), ids=NGINX)
def test_a_request_through_nginx_is_refused(open_api: Api, head: str) -> None:
    assert raw(open_api, head).startswith("HTTP/1.1 401 ")


@pytest.mark.parametrize("head", OTHER_PROXIES)
def test_a_request_with_a_sign_of_a_proxy_is_refused(open_api: Api, head: str) -> None:
    answer = raw(open_api, head)
    assert answer.startswith("HTTP/1.1 401 ")
    assert "passed on by a proxy" in answer


@pytest.mark.parametrize(
    "host", ["rebound.example:PORT", "127.0.0.1.example:PORT", "localhost.:PORT", "0.0.0.0:PORT", "2130706433:PORT",
             "localhost:1", "localhost", "evil@localhost:PORT", "", "[::ffff:127.0.0.1]:PORT"]
)  # fmt: skip
def test_another_host_name_is_refused_because_its_owner_chooses_its_address(open_api: Api, host: str) -> None:
    assert raw(open_api, f"GET /api/jobs HTTP/1.1\nHost: {host}").split(" ")[1] in ("400", "401")


@pytest.mark.parametrize(
    "headers",
    [
        "Origin: https://evil.example\nSec-Fetch-Site: cross-site",
        "Origin: https://evil.example",
        "Origin: null",
        "Origin: http://localhost:1",
        "Origin: https://localhost:PORT",
        "Sec-Fetch-Site: cross-site",
        "Sec-Fetch-Site: same-site",
    ],
)
@pytest.mark.parametrize("method", ["GET /api/jobs", "POST /api/jobs/01920000-0000-7000-8000-000000000000/cancel"])
def test_a_request_that_a_foreign_page_caused_is_refused(open_api: Api, method: str, headers: str) -> None:
    answer = raw(open_api, f"{method} HTTP/1.1\nHost: localhost:PORT\nContent-Type: text/plain\n{headers}")
    assert answer.startswith("HTTP/1.1 401 ")
    assert "a page of another site" in answer


def test_the_refusal_names_the_hosts_that_are_accepted(open_api: Api) -> None:
    document = problem(open_api.get("/api/jobs", headers={"host": "rebound.example"}), 401, "unauthorized")
    assert f"localhost:{urlsplit(open_api.url).port}" in document["detail"]
    assert "server.keyless" in document["detail"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says whose a connection is")
@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_the_user_at_the_other_end_is_known(
    monkeypatch: pytest.MonkeyPatch, family: socket.AddressFamily, host: str
) -> None:
    with (
        socket.create_server((host, 0), family=family) as listening,
        socket.create_connection(listening.getsockname()[:2]) as client,
    ):
        address = keyless._address(host)
        assert address is not None
        ends = (address, client.getsockname()[1]), (address, listening.getsockname()[1])
        assert not keyless._is_other_user(*ends)
        monkeypatch.setattr(os, "geteuid", lambda: 4_000_000)
        assert keyless._is_other_user(*ends)


def test_a_request_is_judged_once(sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard and the handler need the caller; looking its user up reads a table of all connections."""
    judged: list[object] = []
    monkeypatch.setattr(keyless, "objection", judged.append)
    with TestClient(create_app(Installation(tmp_path, {"database.url": sqlite_url}).settings)) as client:
        assert client.post("/api/generate", json={"prompt": "a"}).status_code == 202
    assert len(judged) == 1


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "images.example"])
def test_a_keyless_service_must_listen_on_loopback(host: str) -> None:
    settings = load_settings({}, {"server.keyless": True, "server.host": host, "data_dir": "/nonexistent"})
    with pytest.raises(ConfigurationError, match=r"server\.keyless: server\.host must be a loopback address"):
        load_keys(settings)


def test_a_keyless_service_has_no_api_keys() -> None:
    given = {"server.keyless": True, "server.api_keys": {"anna": "anna-key-0123456789"}, "data_dir": "/nonexistent"}
    with pytest.raises(ConfigurationError, match=r"cannot be combined with server\.api_keys"):
        load_keys(load_settings({}, given))
