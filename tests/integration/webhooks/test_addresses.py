"""Whom this service never posts to, whatever a caller asks."""

import socket

import pytest

from tests.integration.webhooks.conftest import Start, attempts_of, ended_job
from tests.integration.webhooks.receiver import Receiver
from worker.addresses import ForbiddenAddress, resolve
from zcore.jobs.database import Database

FORBIDDEN = [
    "https://127.0.0.1/hook",
    "https://127.1/hook",
    "https://2130706433/hook",
    "https://0.0.0.0/hook",
    "https://10.1.2.3/hook",
    "https://172.16.0.1/hook",
    "https://192.168.1.1/hook",
    "https://100.64.0.1/hook",
    "https://169.254.169.254/latest/meta-data",
    "https://224.0.0.1/hook",
    "https://255.255.255.255/hook",
    "https://[::1]/hook",
    "https://[::]/hook",
    "https://[::ffff:127.0.0.1]/hook",
    "https://[::ffff:169.254.169.254]/hook",
    "https://[::127.0.0.1]/hook",
    "https://[64:ff9b::10.0.0.1]/hook",
    "https://[2002:7f00:1::]/hook",
    "https://[fc00::1]/hook",
    "https://[fe80::1]/hook",
    "https://[fec0::1]/hook",
    "https://[ff02::1]/hook",
    "https://localhost/hook",
]


@pytest.mark.parametrize("url", FORBIDDEN)
def test_an_address_of_ones_own_network_is_refused(url: str) -> None:
    with pytest.raises(ForbiddenAddress, match="not a public address"):
        resolve(url, allow_private=False)


def test_plain_http_is_refused() -> None:
    with pytest.raises(ForbiddenAddress, match="only https"):
        resolve("http://8.8.8.8/hook", allow_private=False)


def test_a_name_that_leads_nowhere_is_refused() -> None:
    with pytest.raises(ForbiddenAddress, match="does not resolve"):
        resolve("https://" + "a" * 70 + ".example/hook", allow_private=False)


@pytest.mark.parametrize(
    "url", ["https://8.8.8.8/hook", "https://[2001:4860:4860::8888]/hook", "https://[64:ff9b::808:808]/hook"]
)
def test_a_public_address_is_allowed(url: str) -> None:
    """The last as a host without IPv4 reaches one that has nothing else."""
    assert resolve(url, allow_private=False).urls == (url.replace("/hook", ":443/hook"),)


def test_one_private_address_among_public_ones_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", _answers("8.8.8.8", "10.0.0.1"))
    with pytest.raises(ForbiddenAddress, match=r"10\.0\.0\.1"):
        resolve("https://mixed.example/hook", allow_private=False)


def test_what_was_checked_is_what_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that answers differently the second time (DNS rebinding) is asked only once."""
    monkeypatch.setattr(socket, "getaddrinfo", _answers("8.8.8.8"))
    target = resolve("https://name.example:8443/hook?a=b#c", allow_private=False)
    assert target.urls == ("https://8.8.8.8:8443/hook?a=b",)
    assert (target.host, target.host_header) == ("name.example", "name.example:8443")


def test_a_name_in_another_script_is_named_as_the_network_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", _answers("8.8.8.8"))
    assert resolve("https://bücher.example/hook", allow_private=False).host_header == "xn--bcher-kva.example"


def test_a_forbidden_address_is_a_try_on_record_and_nothing_is_sent(
    database: Database, receiver: Receiver, start: Start
) -> None:
    job = ended_job(database, receiver.url.replace("http://127.0.0.1", "https://localhost"))
    start(allow_private_addresses=False)
    attempt = attempts_of(database, job, 1)[0]
    assert attempt.status_code is None
    assert "not a public address" in attempt.answer
    assert receiver.told == []


def _answers(*addresses: str):  # type: ignore[no-untyped-def]
    def answer(_host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    return answer
