"""Limit on guessing keys: API keys, the admin key of a request, and the admin key of the sign-in form alike.

Takes each presented key and whether it was right; refuses more once too many different wrong ones were presented, by
one address or by all. A client that repeats one outdated key is not guessing, and a key that was right from an address
is accepted from there whatever others do. Each process counts separately, and a restart resets the counts.
"""

import hashlib
import ipaddress
import math
import time
from collections.abc import Callable

from zcore.errors import TooManyWrongKeys
from zcore.telemetry import log

MAX_WRONG_KEYS = 5
MAX_WRONG_KEYS_OF_ALL = 1000
WINDOW_S = 60.0
MAX_REMEMBERED = 10_000


class KeyGuesses:
    """Wrong keys of the last minute by address, and the pairs of address and key that were right before."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends_at = 0.0
        self._wrong: dict[str, set[bytes]] = {}  # digests of different wrong keys by address, in the current window
        self._right: dict[tuple[str, bytes], None] = {}  # in order of their last use

    def judge(self, address: str, kind: str, key: str, is_right: bool) -> None:
        """Record a presented key of this kind, and log it if it is wrong.

        Raises `TooManyWrongKeys` if the limit is reached, even for a right key that was not used from this address
        before.
        """
        client = _network(address)
        digest = hashlib.sha256(f"{kind} {key}".encode()).digest()
        if is_right and (client, digest) in self._right:
            self._remember(client, digest)
            return
        wait_s = self._wait_s(client)
        if not is_right:
            log.warning("auth.failed", address=address, kind=kind, refused_for_s=wait_s)
        if wait_s:
            raise TooManyWrongKeys(wait_s)
        if is_right:
            self._remember(client, digest)
        else:
            self._wrong.setdefault(client, set()).add(digest)

    def _wait_s(self, client: str) -> int:
        now = self._clock()
        if now >= self._ends_at:
            self._ends_at = now + WINDOW_S
            self._wrong.clear()
        is_full = len(self._wrong.get(client, ())) >= MAX_WRONG_KEYS
        is_full = is_full or sum(map(len, self._wrong.values())) >= MAX_WRONG_KEYS_OF_ALL
        return math.ceil(self._ends_at - now) if is_full else 0

    def _remember(self, client: str, digest: bytes) -> None:
        self._right.pop((client, digest), None)
        self._right[client, digest] = None
        if len(self._right) > MAX_REMEMBERED:
            del self._right[next(iter(self._right))]


def _network(address: str) -> str:
    """Return the address, or the /64 network of an IPv6 address, of which one customer has all."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ipaddress.ip_network((parsed, 64), strict=False)) if parsed.version == 6 else address
