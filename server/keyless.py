"""Who may call without a key (`server.keyless`): the user who runs the service, by a direct connection on this machine.

Takes a connection; returns why it is refused. A request that a proxy passed on or that a page of another site caused
looks local in many ways, so every sign of either refuses it. On Linux the user at the other end of the connection is
known too; elsewhere a forwarder that changes no byte of a request cannot be detected.
"""

import ipaddress
import os
import sys
from pathlib import Path
from typing import Any

from litestar.connection import ASGIConnection

Connection = ASGIConnection[Any, Any, Any, Any]
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

FORWARDED_PREFIX = "x-forwarded-"
FORWARDED_HEADERS = frozenset(
    {"forwarded", "via", "x-real-ip", "x-client-ip", "x-cluster-client-ip", "true-client-ip", "cf-connecting-ip"}
)
TABLE_READS = 6
"""How often the kernel's table of connections is read: it may lack a row while others open and close."""
OWN_PAGES = ("same-origin", "none")  # values of Sec-Fetch-Site: our own page, or an address that the user entered


def objection(connection: Connection) -> str | None:
    """Return why this connection is not one of this machine's user, or None if it is."""
    client, server = connection.client, connection.scope["server"]
    ours, peer = (_address(end[0]) if end else None for end in (server, client))
    if client is None or server is None or server[1] is None or not (_is_loopback(ours) and _is_loopback(peer)):
        return "the connection does not come from this machine"
    # nginx before 1.29.7 speaks HTTP/1.0 to its upstream and need not add a header; browsers and curl speak 1.1.
    if _is_forwarded(connection) or connection.scope["http_version"] == "1.0":
        return "the request was passed on by a proxy"
    names = _names(server[0], server[1])
    host = connection.headers.get("host", "").lower()
    if host not in names:
        return f"the header Host must be {' or '.join(sorted(names))}"
    origin = connection.headers.get("origin")
    is_foreign = connection.headers.get("sec-fetch-site", "none") not in OWN_PAGES
    if is_foreign or (origin is not None and origin.lower().removeprefix("http://") not in names):
        return "the request was caused by a page of another site"
    if peer is not None and ours is not None and _is_other_user((peer, client.port), (ours, server[1])):
        return "the connection does not come from the user who runs the service"
    return None


def _names(host: str, port: int) -> set[str]:
    """Return the values of Host that name this server: loopback names with its port, which may be left out if 80."""
    hosts = {"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host}
    return {f"{name}:{port}" for name in hosts} | (hosts if port == 80 else set[str]())


def _is_forwarded(connection: Connection) -> bool:
    return any(name in FORWARDED_HEADERS or name.startswith(FORWARDED_PREFIX) for name in connection.headers)


def _is_loopback(address: _Address | None) -> bool:
    return address is not None and address.is_loopback


def _address(text: str) -> _Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _is_other_user(client: tuple[_Address, int], server: tuple[_Address, int]) -> bool:
    """Return whether another user opened the client's end; False where the system does not say whose it is."""
    table = Path("/proc/net/tcp6" if client[0].version == 6 else "/proc/net/tcp")
    for _ in range(TABLE_READS):
        try:
            rows = table.read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            return False
        uids = [fields[7] for fields in map(str.split, rows) if fields[1:3] == [_hex(*client), _hex(*server)]]
        if uids:
            return uids != [str(os.geteuid())]
    return True


def _hex(address: _Address, port: int) -> str:
    """Return an end of a connection as the kernel's table shows it: 32-bit words in the machine's byte order."""
    packed = address.packed
    words = (int.from_bytes(packed[start : start + 4], sys.byteorder) for start in range(0, len(packed), 4))
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"
