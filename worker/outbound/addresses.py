"""Checks which addresses may be reached: a server that follows its callers' URLs must not reach its own network.

A URL is resolved once, and the connection goes to the addresses that were checked. Does not connect. The tables are our
own, because `ipaddress.is_global` differs between Python's patch releases.
"""

import ipaddress
import socket
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from zcore.errors import ForbiddenAddress, UnknownHost
from zcore.request import ascii_host
from zcore.settings import WebhooksSettings

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# The IANA IPv4 and IPv6 Special-Purpose Address Registries, with the blocks up to RFC 9637 (August 2024). Blocks that
# are globally reachable are left out, but for those inside another (192.0.0.9 and .10, parts of 2001::/23), which serve
# protocols that are not HTTP.
SPECIAL_IPV4 = (
    "0.0.0.0/8",  # this network
    "10.0.0.0/8",  # private
    "100.64.0.0/10",  # shared by a provider's customers; 100.100.100.200 is a cloud's metadata service
    "127.0.0.0/8",  # loopback
    "169.254.0.0/16",  # link-local; 169.254.169.254 is the metadata service of most clouds
    "172.16.0.0/12",  # private
    "192.0.0.0/24",  # IETF protocols; 192.0.0.192 is a cloud's metadata service
    "192.0.2.0/24",  # documentation
    "192.88.99.0/24",  # 6to4 relays, deprecated
    "192.168.0.0/16",  # private
    "198.18.0.0/15",  # benchmarks
    "198.51.100.0/24",  # documentation
    "203.0.113.0/24",  # documentation
    "224.0.0.0/4",  # multicast, of the registry of multicast addresses
    "240.0.0.0/4",  # reserved, and broadcast
    "168.63.129.16/32",  # not in the registry: the host agent and name server of a cloud
)
SPECIAL_IPV6 = (
    "2001::/23",  # IETF protocols; Teredo is judged by what it embeds
    "2001:db8::/32",  # documentation
    "3fff::/20",  # documentation
)
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")  # RFC 4291; no public server has an IPv6 address outside it
MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")  # RFC 4291, section 2.5.5.2
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052
SIXTOFOUR = ipaddress.IPv6Network("2002::/16")  # RFC 3056
TEREDO = ipaddress.IPv6Network("2001::/32")  # RFC 4380
ISATAP = (0x00005EFE, 0x02005EFE)  # RFC 5214, section 6.1: before the IPv4 address, in any prefix
FORBIDDEN = tuple(map(ipaddress.ip_network, (*SPECIAL_IPV4, *SPECIAL_IPV6)))
WEB_PORTS = (80, 443)
FIRST_UNPRIVILEGED_PORT = 1024


@dataclass(frozen=True, slots=True)
class Target:
    """Where to connect: `urls` with an address in place of the host name, in order of preference, and the host name."""

    urls: tuple[str, ...]
    host: str
    host_header: str


def resolve(url: str, settings: WebhooksSettings) -> Target:
    """Return the checked target of a URL.

    Without `allow_private_addresses`, only https is allowed, to port 80, 443 or one from 1024, and the URL is refused
    if any of its addresses is loopback, private, link-local, multicast, reserved or a cloud's own. Addresses in
    `denied_networks` are always refused.
    Raises `ForbiddenAddress`, and its subclass `UnknownHost` if the name has no address.
    """
    parts = urlsplit(url)
    if parts.scheme != "https" and not settings.allow_private_addresses:
        raise ForbiddenAddress("must be an https URL")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if port not in WEB_PORTS and port < FIRST_UNPRIVILEGED_PORT and not settings.allow_private_addresses:
        raise ForbiddenAddress(f"port {port} is not allowed; use 443, 80 or one from {FIRST_UNPRIVILEGED_PORT}")
    host = ascii_host(parts.hostname or "")
    if host is None:
        raise UnknownHost(f"{parts.hostname} is not a valid host name")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as fault:
        raise UnknownHost(f"the host name {parts.hostname} does not resolve") from fault
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    denied = [ipaddress.ip_network(network) for network in settings.denied_networks]
    for address in addresses:
        if not settings.allow_private_addresses and not is_public(address):
            raise ForbiddenAddress(f"{host} resolves to {address}, which is not a public address")
        if _is_in(address, denied):
            raise ForbiddenAddress(f"{host} resolves to {address}, which this service may not reach")
    urls = (parts._replace(netloc=f"{_bracketed(address)}:{port}", fragment="").geturl() for address in addresses)
    named = f"[{host}]" if ":" in host else host
    return Target(tuple(dict.fromkeys(urls)), host, named if parts.port is None else f"{named}:{port}")


def is_public(address: _Address) -> bool:
    """Return whether an address is public; one that embeds IPv4 addresses is if all of them are."""
    inner = _embedded(address)
    if not all(map(is_public, inner)):
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if any(address in network for network in (MAPPED, NAT64, TEREDO)):
            return True
        if address not in GLOBAL_UNICAST:
            return False
    return not any(address in network for network in FORBIDDEN)


def _is_in(address: _Address, networks: Collection[_Network]) -> bool:
    return any(one in network for one in (address, *_embedded(address)) for network in networks)


def _embedded(address: _Address) -> tuple[ipaddress.IPv4Address, ...]:
    """Return the IPv4 addresses to which a router, a relay or this host would pass on packets for this address."""
    if isinstance(address, ipaddress.IPv4Address):
        return ()
    bits = int(address)
    last, server = ipaddress.IPv4Address(bits & 0xFFFFFFFF), ipaddress.IPv4Address(bits >> 64 & 0xFFFFFFFF)
    if address in MAPPED or address in NAT64 or bits >> 32 & 0xFFFFFFFF in ISATAP:
        return (last,)
    if address in SIXTOFOUR:
        return (ipaddress.IPv4Address(bits >> 80 & 0xFFFFFFFF),)
    if address in TEREDO:
        return (server, ipaddress.IPv4Address(~bits & 0xFFFFFFFF))  # the client's address is stored inverted
    return ()


def _bracketed(address: _Address) -> str:
    return f"[{address}]" if address.version == 6 else str(address)
