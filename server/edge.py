"""The ASGI layer outside everything: what holds for every answer, whichever route or error it comes from.

Takes the application; gives each request an id, refuses what no route may see, answers HEAD and OPTIONS, limits the
time that a body may take, and completes the headers of every answer. Knows nothing of routes.
"""

import asyncio
import ipaddress
import re
import uuid
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, cast

import msgspec
from litestar.exceptions import HTTPException
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from server.drain import Drain
from server.problems import CODES, MEDIA_TYPE, OVERLOADED_RETRY_AFTER_S, problem_document
from zcore.settings import ServerSettings
from zcore.telemetry import bound, log

MAX_HEAD_BYTES = 64 * 1024
"""The largest request line and headers together; most servers accept between 8 and 64 KiB."""
HEAD_TOO_LARGE = f"the request line and headers must have at most {MAX_HEAD_BYTES} bytes together"
OVERLOADED = "overloaded"
"""Entry of `scope["state"]` by which the server says that it has too many connections."""
LIVENESS_PATH = "/health/live"
Headers = Sequence[tuple[bytes, bytes]]
_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+/=-]{0,127}")
_HOST = re.compile(r"(\[[^\[\]]*\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::(\d{0,5}))?")
_NO_ROUTE_HAS_THIS_METHOD = "TRACE"


class Edge:
    """An ASGI application around another one. `server` holds the limits of slow clients.

    Once `drain` has begun, every answer closes its connection.
    """

    def __init__(self, app: ASGIApp, server: ServerSettings, drain: Drain) -> None:
        self._app = app
        self._server = server
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; other events, such as the start of the process, are passed on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = cast(dict[str, Any], scope)
        method, path = request["method"], request["path"]
        request_id = _given_request_id(request["headers"]) or uuid.uuid4().hex
        answer, body = _Answer(send, method, request_id, self._drain), _Body(receive, self._server)
        names = {"method": _method_of_application(method), "requested_method": method, "request_id": request_id}
        inner: Any = {**request, **names}
        with bound(request_id=request_id):
            try:
                if refused := _refusal(request):
                    await answer.problem(path, *refused)
                else:
                    await self._app(inner, body.receive, answer.send)
            except Exception as error:
                log.error("request.crashed", method=method, path=path, exc_info=error)
                if answer.started:
                    raise
                detail = "an unexpected error occurred; see the server's log for details"
                await answer.problem(path, HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error", detail)


class _Answer:
    """One answer on its way out: completes the headers, and leaves out the body where the method wants none."""

    def __init__(self, send: Send, method: str, request_id: str, drain: Drain) -> None:
        self._send = send
        self._method = method
        self._request_id = request_id
        self._drain = drain
        self._has_body = method != "HEAD"
        self.started = False

    async def send(self, message: Message) -> None:
        """Send one event of the application."""
        if message["type"] != "http.response.start":
            if self._has_body:
                await self._send(message)
            return
        self.started = True
        status, headers = message["status"], list(cast(Headers, message["headers"]))
        if self._method == "OPTIONS" and status == HTTPStatus.METHOD_NOT_ALLOWED:
            self._has_body = False
            status, headers = HTTPStatus.NO_CONTENT, [(name, value) for name, value in headers if name == b"allow"]
        completed: Any = {**message, "status": int(status), "headers": self._completed(headers)}
        await self._send(completed)
        if not self._has_body:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def problem(
        self, path: str, status: HTTPStatus, code: str, detail: str, headers: dict[str, str] | None = None
    ) -> None:
        """Send an error in the form of RFC 9457."""
        content = msgspec.json.encode(problem_document(path, status, code, detail, request_id=self._request_id))
        all_headers = {"content-type": MEDIA_TYPE, "content-length": str(len(content)), **(headers or {})}
        encoded = [(name.encode(), value.encode()) for name, value in all_headers.items()]
        start: Any = {"type": "http.response.start", "status": int(status), "headers": encoded}
        await self.send(start)
        await self.send({"type": "http.response.body", "body": content, "more_body": False})

    def _completed(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        named = {name.lower() for name, _ in headers}
        always = {
            b"x-request-id": self._request_id.encode(),
            b"x-content-type-options": b"nosniff",
            b"cache-control": b"no-store",
            **({b"connection": b"close"} if self._drain.has_begun else {}),
        }
        missing = [(name, value) for name, value in always.items() if name not in named]
        return [(name, _with_head(value) if name.lower() == b"allow" else value) for name, value in headers] + missing


class _Body:
    """The body of one request, which must arrive at a minimum rate.

    Each `body_timeout_s` begins with the first attempt to read, and again whenever `min_body_bytes_per_s` times that
    many bytes have arrived. A body that stalls or trickles in is refused with 408.
    """

    def __init__(self, receive: Receive, server: ServerSettings) -> None:
        self._receive = receive
        self._timeout_s = server.body_timeout_s
        self._bytes_per_period = server.min_body_bytes_per_s * server.body_timeout_s
        self._period_ends_at: float | None = None
        self._bytes = 0
        self._is_complete = False

    async def receive(self) -> Any:
        """Return the next event. Raises `HTTPException` with status 408 if the body is too slow."""
        if self._is_complete:
            return await self._receive()  # the application waits for the client to disconnect
        now = asyncio.get_running_loop().time()
        if self._period_ends_at is None or self._bytes >= self._bytes_per_period:
            self._period_ends_at, self._bytes = now + self._timeout_s, 0
        try:
            async with asyncio.timeout_at(self._period_ends_at):
                message = await self._receive()
        except TimeoutError:
            detail = f"the body did not arrive: nothing, or too little, within {self._timeout_s:g} s"
            raise HTTPException(status_code=408, detail=detail, headers={"connection": "close"}) from None
        if message["type"] == "http.request":
            self._bytes += len(message["body"])
            self._is_complete = not message.get("more_body", False)
        return message


def _method_of_application(method: str) -> str:
    """Return the method to call the application with.

    HEAD is GET without the body (RFC 9110, section 9.3.2). OPTIONS becomes a method that no route has: the refusal
    lists the methods that the path has, and the framework's own answer to OPTIONS omits some.
    """
    return {"HEAD": "GET", "OPTIONS": _NO_ROUTE_HAS_THIS_METHOD}.get(method, method)


def _with_head(allow: bytes) -> bytes:
    methods = {"OPTIONS", *(method.strip() for method in allow.decode().split(","))}
    if "GET" in methods:
        methods.add("HEAD")
    return ", ".join(sorted(methods)).encode()


def _refusal(request: dict[str, Any]) -> tuple[HTTPStatus, str, str, dict[str, str]] | None:
    """Return status, code, detail and headers of the refusal of a request that no route may see; None if it is fine."""
    headers: Headers = request["headers"]
    if request.get("state", {}).get(OVERLOADED) and request["path"] != LIVENESS_PATH:
        status = HTTPStatus.SERVICE_UNAVAILABLE
        detail = f"the server has too many connections; try again in {OVERLOADED_RETRY_AFTER_S} s"
        return status, CODES[status], detail, {"retry-after": str(OVERLOADED_RETRY_AFTER_S), "connection": "close"}
    address_bytes = len(request.get("raw_path", b"")) + len(request["query_string"])
    if address_bytes + sum(len(name) + len(value) for name, value in headers) > MAX_HEAD_BYTES:
        status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        return status, CODES[status], HEAD_TOO_LARGE, {"connection": "close"}
    if not _has_valid_host(request["http_version"], headers):
        status = HTTPStatus.BAD_REQUEST
        return status, CODES[status], "Host must be given once, as a host name or address with an optional port", {}
    return None


def _has_valid_host(http_version: str, headers: Headers) -> bool:
    """Return whether the request names its host as RFC 9112, section 3.2 requires."""
    hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
    if not hosts:
        return http_version == "1.0"
    found = _HOST.fullmatch(hosts[0])
    if len(hosts) > 1 or found is None or int(found[2] or 0) > 65535:
        return False
    return not found[1].startswith("[") or _is_ipv6(found[1][1:-1])


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _given_request_id(headers: Headers) -> str | None:
    """Return the caller's own id of the request, if it has one that is safe to log and to return."""
    given = [value.decode("latin-1") for name, value in headers if name == b"x-request-id"]
    return given[0] if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]) else None
