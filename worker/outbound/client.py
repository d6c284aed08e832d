"""HTTP client for checked targets: connects only to their addresses, and follows no redirect and no proxy."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence

import httpx

from worker.outbound.addresses import Target


class OutboundClient:
    """HTTP client that threads may share, each with its own event loop."""

    def __init__(self) -> None:
        self._tls = httpx.create_ssl_context(trust_env=False)

    @contextlib.asynccontextmanager
    async def stream(
        self, method: str, target: Target, headers: Mapping[str, str], timeout_s: float, content: bytes | None = None
    ) -> AsyncGenerator[httpx.Response]:
        """Yield the response, its body not yet read, of the first address that accepts a connection.

        The response's head must arrive within `timeout_s` seconds. Each call uses a new client, because hosts
        behind one address would share pooled connections. Raises `TimeoutError`, `httpx.HTTPError` and
        `httpx.InvalidURL`.
        """
        all_headers = {"host": target.host_header, "accept-encoding": "identity", **headers}
        extensions = {"sni_hostname": target.host}
        async with httpx.AsyncClient(verify=self._tls, timeout=None, follow_redirects=False, trust_env=False) as client:
            # Asynchronous only for this timeout: a server that sends single bytes slowly exceeds no socket timeout.
            async with asyncio.timeout(timeout_s):
                requests = [
                    client.build_request(method, url, content=content, headers=all_headers, extensions=extensions)
                    for url in target.urls
                ]
                response = await _first_reached(client, requests)
            async with contextlib.aclosing(response):
                yield response


async def _first_reached(client: httpx.AsyncClient, requests: Sequence[httpx.Request]) -> httpx.Response:
    for request in requests[:-1]:
        with contextlib.suppress(httpx.ConnectError):
            return await client.send(request, stream=True)
    return await client.send(requests[-1], stream=True)
