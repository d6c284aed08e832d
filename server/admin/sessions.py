"""Access to the admin pages: sessions in an encrypted cookie, each with a row in the database, and form tokens.

Takes the admin key; provides the session middleware, a guard, and the operations that handlers perform on a session.
All hosts with the same admin key and database share sessions. Does not depend on any page.
"""

import asyncio
import hashlib
import hmac
import secrets
import time
import uuid
from typing import Any, cast

from litestar import Request
from litestar.connection import ASGIConnection
from litestar.exceptions import PermissionDeniedException
from litestar.handlers import BaseRouteHandler
from litestar.middleware import DefineMiddleware
from litestar.middleware.session import SessionMiddleware
from litestar.middleware.session.client_side import ClientSideSessionBackend, CookieBackendConfig
from litestar.types import ASGIApp

from zcore.errors import SignedOut
from zcore.jobs import admin_sessions
from zcore.jobs.database import Database

ADMIN_PATH = "/admin"
NO_SESSION_NEEDED = "no_session_needed"  # the `opt` of handlers that work without signing in
TOKEN_FIELD = "form_token"
SESSION_LIFETIME_S = 12 * 3600
MAX_DESTINATION = 1000  # characters of a page's address
AnyRequest = Request[Any, Any, Any]


def cookie_session(admin_key: str, public_url: str) -> DefineMiddleware:
    """Return the session middleware for this admin key. Changing the key ends every session.

    Clients that have not signed in get a cookie too, and could use it to guess the key offline: scrypt (RFC 7914) makes
    each guess expensive.
    """
    secret = hashlib.scrypt(admin_key.encode(), salt=b"zimage admin session", n=2**14, r=8, p=1, dklen=32)
    config = CookieBackendConfig(
        secret=secret,
        key="zimage_admin",
        path=ADMIN_PATH,
        max_age=SESSION_LIFETIME_S,
        secure=public_url.startswith("https://"),
        httponly=True,
        samesite="strict",
    )
    return DefineMiddleware(_session_middleware, config=config)


async def require_session(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """Guard of every admin page. The application's `Database` is in `state.database`.

    Raises `SignedOut` if there is no session, and `PermissionDeniedException` if a form lacks this session's token.
    """
    if not handler.opt.get(NO_SESSION_NEEDED) and not await is_signed_in(connection):
        raise SignedOut("sign in with the admin key to see this page")
    request = cast(AnyRequest, connection)  # Litestar passes the request itself to guards
    if request.method == "POST":
        form = await request.form()
        given, expected = str(form.get(TOKEN_FIELD, "")), str(request.session.get("token", ""))
        if not expected or not hmac.compare_digest(given.encode(), expected.encode()):
            raise PermissionDeniedException("This form has expired. Go back, reload the page and try again.")


async def is_signed_in(connection: ASGIConnection[Any, Any, Any, Any]) -> bool:
    """Return whether the session was signed in less than 12 hours ago, and not signed out since.

    Activity does not extend it.
    """
    if connection.session.get("ends_at", 0.0) <= time.time():
        return False
    return await asyncio.to_thread(_is_open, connection.app.state.database, _session_id(connection))


async def start_session(request: AnyRequest) -> str:
    """Start a session with a fresh form token. Return the path of the remembered page, or that of the job list."""
    destination = str(request.session.get("destination", ADMIN_PATH))
    request.session.clear()
    request.session["id"] = str(await asyncio.to_thread(_start, request.app.state.database))
    request.session["ends_at"] = time.time() + SESSION_LIFETIME_S
    return destination


async def end_session(request: AnyRequest) -> None:
    """End the session, in every browser that has its cookie."""
    await asyncio.to_thread(_end, request.app.state.database, _session_id(request))
    request.session.clear()


def remember_destination(request: AnyRequest) -> None:
    """Remember the requested page, so that signing in can return to it; without its query if that is long.

    The cookie holds it: with a long one, a browser's next requests would exceed the limit on headers.
    """
    if request.method == "GET":
        path, query = request.url.path, request.url.query
        page = f"{path}?{query}" if query else path
        request.session["destination"] = next((it for it in (page, path) if len(it) <= MAX_DESTINATION), ADMIN_PATH)


def form_token(request: AnyRequest) -> str:
    """Return the token that this session's forms carry. Another site can neither read nor guess it."""
    return str(request.session.setdefault("token", secrets.token_urlsafe(24)))


def add_notice(request: AnyRequest, text: str, *, refused: bool = False) -> None:
    """Store one sentence that the next page shows. `refused` marks it as an error."""
    request.session["notice"] = {"text": text, "refused": refused}


def take_notice(request: AnyRequest) -> dict[str, Any] | None:
    """Remove the pending notice and return it."""
    return request.session.pop("notice", None)


def _session_id(connection: ASGIConnection[Any, Any, Any, Any]) -> uuid.UUID:
    return uuid.UUID(connection.session.get("id", str(uuid.UUID(int=0))))  # a cookie of an earlier version has none


def _is_open(database: Database, session_id: uuid.UUID) -> bool:
    with database.read() as transaction:
        return admin_sessions.is_open(transaction, session_id)


def _start(database: Database) -> uuid.UUID:
    with database.write() as transaction:
        return admin_sessions.start(transaction, SESSION_LIFETIME_S)


def _end(database: Database, session_id: uuid.UUID) -> None:
    with database.write() as transaction:
        admin_sessions.end(transaction, session_id)


def _session_middleware(app: ASGIApp, config: CookieBackendConfig) -> SessionMiddleware[ClientSideSessionBackend]:
    """Create the middleware for each route, because a router copies its middleware and a cipher cannot be copied."""
    return SessionMiddleware(app, ClientSideSessionBackend(config))
