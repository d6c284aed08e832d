"""Whose request it is behind a proxy: what a trusted one states, and nothing that anyone else does."""

import httpx
import pytest

from server.key_guesses import MAX_WRONG_KEYS
from tests.integration.edge.conftest import KEY, Serving

GUESSER = {"x-forwarded-for": "198.51.100.9, 203.0.113.1"}  # the client wrote the first, the proxy the last
ANOTHER = {"x-forwarded-for": "203.0.113.2"}


@pytest.mark.parametrize("trusted", [True, False])
def test_clients_of_a_trusted_proxy_are_limited_separately(serving: Serving, trusted: bool) -> None:
    with serving(server__trusted_proxies=["127.0.0.0/8"] if trusted else []) as served, httpx.Client() as client:

        def status(key: str, headers: dict[str, str]) -> int:
            given = {"authorization": f"Bearer {key}", **headers}
            return client.get(f"{served.url}/api/jobs", headers=given).status_code

        for number in range(MAX_WRONG_KEYS):
            assert status(f"guess {number}", GUESSER) == 401
        assert status(KEY, GUESSER) == 429
        assert status(KEY, {"x-forwarded-for": "192.0.2.7, 203.0.113.1"}) == 429
        assert status(KEY, ANOTHER) == (200 if trusted else 429)
