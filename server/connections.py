"""Connections to clients: the limits that uvicorn leaves to a proxy, and uvicorn's configuration.

A connection must complete the head of its request in time and within a size, and read what it is sent; beyond a number
of connections, requests are refused. `server.edge` limits the bodies.
"""

import asyncio
import uuid
from http import HTTPStatus
from typing import Any, cast

import msgspec
import uvicorn
from litestar import Litestar
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.edge import HEAD_TOO_LARGE, MAX_HEAD_BYTES, OVERLOADED, Edge
from server.problems import CODES, MEDIA_TYPE, problem_document
from zcore.settings import Settings

ANSWERED_ABOVE_LIMIT = 100
"""How many connections above the limit get an answer; any further ones are closed at once."""


def configure(app: Litestar, settings: Settings) -> uvicorn.Config:
    """Return uvicorn's configuration to serve this application at the edge with the limits of these settings."""
    server = settings.server
    return uvicorn.Config(
        Edge(app, server, app.state.drain),
        host=server.host,
        port=server.port,
        http=limited_protocol(server.head_timeout_s, server.body_timeout_s, server.max_connections),
        ws="none",
        # Without a limit, uvicorn waits indefinitely for open streams.
        timeout_graceful_shutdown=server.shutdown_grace_s,
        # Only these may state in X-Forwarded-For whose request they pass on; anyone can send the header.
        proxy_headers=bool(server.trusted_proxies),
        forwarded_allow_ips=list(server.trusted_proxies),
        server_header=False,
        access_log=False,
        log_config=None,
    )


def limited_protocol(head_timeout_s: float, unread_timeout_s: float, max_connections: int) -> type[HttpToolsProtocol]:
    """Return uvicorn's HTTP protocol with these limits.

    A head must be complete within `head_timeout_s` seconds, and an answer may be left unread for `unread_timeout_s`.
    """

    class LimitedProtocol(HttpToolsProtocol):
        _head_timer: asyncio.TimerHandle | None = None
        _unread_timer: asyncio.TimerHandle | None = None
        _head_has_begun = False
        _head_bytes = 0

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > max_connections + ANSWERED_ABOVE_LIMIT:
                transport.abort()
            else:
                self._await_head(head_timeout_s)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._head_timer = _canceled(self._head_timer)
            self._unread_timer = _canceled(self._unread_timer)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._head_has_begun:
                self._head_bytes += len(data)
                if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                    self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, HEAD_TOO_LARGE)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._head_has_begun, self._head_bytes = True, 0

        def on_headers_complete(self) -> None:
            self._head_has_begun = False
            self._head_timer = _canceled(self._head_timer)
            cast(dict[str, Any], self.scope)["state"][OVERLOADED] = len(self.connections) > max_connections
            super().on_headers_complete()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.cycle.response_complete:  # no further request is complete yet
                self._await_head(self.timeout_keep_alive + head_timeout_s)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread_timer = self.loop.call_later(unread_timeout_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._unread_timer = _canceled(self._unread_timer)

        def send_400_response(self, msg: str) -> None:
            self._refuse(HTTPStatus.BAD_REQUEST, "the request is not valid HTTP/1.1")

        def _await_head(self, timeout_s: float) -> None:
            _canceled(self._head_timer)
            self._head_timer = self.loop.call_later(timeout_s, self._give_up)

        def _give_up(self) -> None:
            """Close a connection whose head is not complete; say why if it has begun one."""
            if self._head_has_begun and not self.transport.is_closing():
                detail = f"the request line and headers did not arrive within {head_timeout_s:g} s"
                self._refuse(HTTPStatus.REQUEST_TIMEOUT, detail)
            self.transport.close()

        def _refuse(self, status: HTTPStatus, detail: str) -> None:
            self.transport.write(_refusal(status, detail))
            self.transport.close()

    return LimitedProtocol


def _canceled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def _refusal(status: HTTPStatus, detail: str) -> bytes:
    """Return a complete HTTP response with a problem, for a request that never reached the application."""
    request_id = uuid.uuid4().hex
    content = msgspec.json.encode(problem_document(None, status, CODES[status], detail, request_id=request_id))
    head = (
        f"HTTP/1.1 {int(status)} {status.phrase}\r\ncontent-type: {MEDIA_TYPE}\r\ncontent-length: {len(content)}\r\n"
        f"x-request-id: {request_id}\r\nx-content-type-options: nosniff\r\ncache-control: no-store\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode() + content
