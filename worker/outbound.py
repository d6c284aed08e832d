"""Requests to addresses that callers gave: sent to the checked address, and to no other that it may lead to.

Takes a `Target`; gives the answer, its body not yet read. Follows no redirect and no proxy. Does not know what it
carries.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence

import httpx

from worker.addresses import Target


class Outbound:
    """Safe to share between threads, each with an event loop of its own."""

    def __init__(self) -> None:
        self._tls = httpx.create_ssl_context(trust_env=False)

    @contextlib.asynccontextmanager
    async def answer(
        self, method: str, target: Target, headers: Mapping[str, str], within_s: float, content: bytes | None = None
    ) -> AsyncGenerator[httpx.Response]:
        """The answer of the first address that takes a connection; its head has come within `within_s` seconds.

        A client of its own each time: kept connections would be shared by hosts behind one address. Raises
        `TimeoutError`, `httpx.HTTPError` and `httpx.InvalidURL`.
        """
        told = {"host": target.host_header, "accept-encoding": "identity", **headers}
        extensions = {"sni_hostname": target.host}
        async with httpx.AsyncClient(verify=self._tls, timeout=None, follow_redirects=False, trust_env=False) as client:
            # Asynchronous only for this: a server that sends a byte now and then never meets a socket's timeout.
            async with asyncio.timeout(within_s):
                requests = [
                    client.build_request(method, url, content=content, headers=told, extensions=extensions)
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
