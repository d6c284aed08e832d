"""Addresses that this service never connects to, even if a caller names them."""

import ipaddress
import socket

import pytest

from tests.integration.webhooks.conftest import Start, attempts_of, ended_job
from tests.integration.webhooks.receiver import Receiver
from worker.outbound.addresses import MAPPED, NAT64, is_public, resolve
from zcore.errors import ConfigurationError, ForbiddenAddress, UnknownHost
from zcore.jobs.database import Database
from zcore.settings import WebhooksSettings, load_settings

PUBLIC_ONLY = WebhooksSettings()
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
    # Metadata services and host agents of clouds.
    "https://192.0.0.192/hook",
    "https://168.63.129.16/hook",
    "https://100.100.100.200/hook",
    "https://[fd00:ec2::254]/hook",
    # The rest of the IANA special-purpose address registries.
    "https://192.0.0.8/hook",
    "https://192.0.2.1/hook",
    "https://192.88.99.1/hook",
    "https://198.18.0.1/hook",
    "https://198.19.255.255/hook",
    "https://198.51.100.1/hook",
    "https://203.0.113.1/hook",
    "https://240.0.0.1/hook",
    "https://[100::1]/hook",
    "https://[100:0:0:1::1]/hook",
    "https://[64:ff9b:1::1]/hook",
    "https://[2001:2::1]/hook",
    "https://[2001:10::1]/hook",
    "https://[2001:20::1]/hook",
    "https://[2001:30::1]/hook",
    "https://[2001:db8::1]/hook",
    "https://[3fff::1]/hook",
    "https://[5f00::1]/hook",
    # IPv6 addresses that embed a private one.
    "https://[64:ff9b::a9fe:a9fe]/hook",
    "https://[2002:a9fe:a9fe::1]/hook",
    "https://[2a00::5efe:127.0.0.1]/hook",
    "https://[2a00::200:5efe:10.0.0.1]/hook",
    "https://[2001:0:a00:1::f7f7:f7f7]/hook",  # Teredo: the server is 10.0.0.1, the client 8.8.8.8
    "https://[2001:0:808:808::f5ff:fffe]/hook",  # and the other way round
    "https://localhost/hook",
]


@pytest.mark.parametrize("url", FORBIDDEN)
def test_a_private_address_is_refused(url: str) -> None:
    with pytest.raises(ForbiddenAddress, match="not a public address"):
        resolve(url, PUBLIC_ONLY)


def test_plain_http_is_refused() -> None:
    with pytest.raises(ForbiddenAddress, match="must be an https URL"):
        resolve("http://8.8.8.8/hook", PUBLIC_ONLY)


def test_a_name_that_does_not_resolve_is_refused() -> None:
    with pytest.raises(UnknownHost, match="does not resolve"):
        resolve("https://nowhere.invalid/hook", PUBLIC_ONLY)
    with pytest.raises(UnknownHost, match="not a valid host name"):
        resolve("https://" + "a" * 70 + ".example/hook", PUBLIC_ONLY)


@pytest.mark.parametrize(
    "url",
    [
        "https://8.8.8.8/hook",
        "https://192.31.196.1/hook",
        "https://192.175.48.1/hook",
        "https://168.63.129.17/hook",
        "https://[2001:4860:4860::8888]/hook",
        "https://[2620:4f:8000::1]/hook",
        "https://[2a00::1]/hook",
        "https://[64:ff9b::808:808]/hook",
        "https://[2002:808:808::1]/hook",
    ],
)
def test_a_public_address_is_allowed(url: str) -> None:
    """A host without IPv4 reaches a server that has only IPv4 by the last but one (NAT64)."""
    assert resolve(url, PUBLIC_ONLY).urls == (url.replace("/hook", ":443/hook"),)


def test_the_table_is_at_least_as_strict_as_the_one_of_python() -> None:
    """Whatever Python's patch level: each registry block that `ipaddress` knows is in our table too."""
    # `is_private` asks about one address; only these names list the blocks.
    for version, constants in ((4, ipaddress._IPv4Constants), (6, ipaddress._IPv6Constants)):
        for network in constants._private_networks:
            assert network.version == version
            if network not in (MAPPED, NAT64):
                assert not is_public(network[0]), network
                assert not is_public(network[-1]), network


@pytest.mark.parametrize("port", [1, 22, 25, 81, 465, 1023])
def test_a_port_of_another_protocol_is_refused(port: int) -> None:
    with pytest.raises(ForbiddenAddress, match=f"port {port} is not allowed; use 443, 80 or one from 1024"):
        resolve(f"https://8.8.8.8:{port}/hook", PUBLIC_ONLY)


@pytest.mark.parametrize("port", [80, 443, 1024, 8443, 65535])
def test_a_port_of_the_web_or_from_1024_is_allowed(port: int) -> None:
    assert resolve(f"https://8.8.8.8:{port}/hook", PUBLIC_ONLY).urls == (f"https://8.8.8.8:{port}/hook",)


@pytest.mark.parametrize("allow_private_addresses", [False, True])
@pytest.mark.parametrize("url", ["https://8.8.4.4/hook", "https://[64:ff9b::808:404]/hook", "https://[2a00:1::1]/hook"])
def test_an_operator_denies_networks_in_addition(url: str, allow_private_addresses: bool) -> None:
    denied = {"webhooks.denied_networks": ["8.8.4.0/24", "2a00:1::/32"]}
    settings = load_settings({}, {**denied, "webhooks.allow_private_addresses": allow_private_addresses}).webhooks
    with pytest.raises(ForbiddenAddress, match="which this service may not reach"):
        resolve(url, settings)
    assert resolve("https://8.8.8.8/hook", settings).host == "8.8.8.8"


@pytest.mark.parametrize("network", ["8.8.4.1/24", "8.8.4.0/33", "1.2.3.4.5", "example.org"])
def test_a_malformed_network_is_refused(network: str) -> None:
    with pytest.raises(ConfigurationError, match=r"webhooks\.denied_networks"):
        load_settings({}, {"webhooks.denied_networks": [network]})


def test_a_name_with_one_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", _resolver("8.8.8.8", "10.0.0.1"))
    with pytest.raises(ForbiddenAddress, match=r"10\.0\.0\.1"):
        resolve("https://mixed.example/hook", PUBLIC_ONLY)


def test_the_checked_address_is_the_one_that_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is resolved only once, so that a different second answer (DNS rebinding) has no effect."""
    monkeypatch.setattr(socket, "getaddrinfo", _resolver("8.8.8.8"))
    target = resolve("https://name.example:8443/hook?a=b#c", PUBLIC_ONLY)
    assert target.urls == ("https://8.8.8.8:8443/hook?a=b",)
    assert (target.host, target.host_header) == ("name.example", "name.example:8443")


def test_an_internationalized_name_is_sent_in_its_ascii_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", _resolver("8.8.8.8"))
    assert resolve("https://bücher.example/hook", PUBLIC_ONLY).host_header == "xn--bcher-kva.example"
    assert resolve("https://straße.example/hook", PUBLIC_ONLY).host_header == "xn--strae-oqa.example"


def test_a_forbidden_address_is_recorded_as_a_failed_attempt_and_nothing_is_sent(
    database: Database, receiver: Receiver, start: Start
) -> None:
    job = ended_job(database, receiver.url.replace("http://127.0.0.1", "https://localhost"))
    start(allow_private_addresses=False)
    attempt = attempts_of(database, job, 1)[0]
    assert attempt.status_code is None
    assert "not a public address" in attempt.response_body
    assert receiver.requests == []


def _resolver(*addresses: str):
    def answer(_host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    return answer
