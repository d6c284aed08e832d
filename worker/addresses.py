"""Which addresses this service may reach: a server that follows its callers' URLs must not reach its own network.

Takes a URL; gives the addresses to connect to, resolved once, so that what was checked is what is used. Does not
connect.
"""

import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")  # RFC 4291; the rest of IPv6 is nobody's webhook
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class ForbiddenAddress(Exception):
    """The URL leads where this service must not go, or nowhere."""


class UnknownHost(ForbiddenAddress):
    """The URL's name has no address, or none that can be found now."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where to connect (`urls`, each with an address in place of the name, the best first) and what the name was."""

    urls: tuple[str, ...]
    host: str
    host_header: str


def resolve(url: str, allow_private: bool) -> Target:
    """The checked target of a URL.

    Without `allow_private` only https is allowed, and loopback, private, link-local (so the metadata services of
    clouds), multicast and reserved addresses are refused, also where only one of several answers is such.
    Raises `ForbiddenAddress`, and `UnknownHost` of it where there is no address.
    """
    parts = urlsplit(url)
    if parts.scheme != "https" and not allow_private:
        raise ForbiddenAddress("only https is allowed")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        host = (parts.hostname or "").encode("idna").decode("ascii")
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as fault:
        raise UnknownHost(f"{parts.hostname} does not resolve") from fault
    addresses = [ipaddress.ip_address(str(answer[4][0]).partition("%")[0]) for answer in answers]
    if not allow_private:
        for address in addresses:
            if not _is_public(address):
                raise ForbiddenAddress(f"{host} leads to {address}, which is not a public address")
    urls = (parts._replace(netloc=f"{_bracketed(address)}:{port}", fragment="").geturl() for address in addresses)
    asked = f"[{host}]" if ":" in host else host
    return Target(tuple(dict.fromkeys(urls)), host, asked if parts.port is None else f"{asked}:{port}")


def _is_public(address: _Address) -> bool:
    """Addresses that carry an IPv4 one inside (6to4, NAT64) are judged by that."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.sixtofour
        if inner is None and address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return _is_public(inner)
        if address not in GLOBAL_UNICAST:
            return False
    return address.is_global and not address.is_multicast


def _bracketed(address: _Address) -> str:
    return f"[{address}]" if address.version == 6 else str(address)
