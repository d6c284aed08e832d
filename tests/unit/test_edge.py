"""The layer around the application, with applications that misbehave."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from litestar.types import Receive, Scope, Send

from server.drain import Drain
from server.edge import Edge
from zcore.settings import ServerSettings


async def crash(scope: Scope, receive: Receive, send: Send) -> None:
    raise RuntimeError("a secret")


async def crash_halfway(scope: Scope, receive: Receive, send: Send) -> None:
    start: Any = {"type": "http.response.start", "status": 200, "headers": []}
    await send(start)
    raise RuntimeError("a secret")


def client_of(app: Any) -> httpx.AsyncClient:
    edge: Any = Edge(app, ServerSettings(), Drain(0, on_begin=lambda: None))
    return httpx.AsyncClient(transport=httpx.ASGITransport(edge), base_url="http://localhost")


def test_a_crash_of_the_application_is_a_problem_without_its_text() -> None:
    async def fetch() -> httpx.Response:
        async with client_of(crash) as client:
            return await client.get("/x", headers={"x-request-id": "order-7"})

    answer = asyncio.run(fetch())
    document = json.loads(answer.content)
    assert (answer.status_code, document["code"], document["request_id"]) == (500, "internal_error", "order-7")
    assert answer.headers["content-type"] == "application/problem+json"
    assert "secret" not in answer.text


def test_a_crash_after_the_answer_has_begun_breaks_it_off() -> None:
    async def fetch() -> httpx.Response:
        async with client_of(crash_halfway) as client:
            return await client.get("/x")

    with pytest.raises(RuntimeError):
        asyncio.run(fetch())
