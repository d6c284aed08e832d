"""Who may use the admin: a session in an encrypted cookie, the token that every form carries, and a brake on guessing.

Takes the admin key; gives the cookie's configuration, a guard, and what handlers do to a session. Nothing is stored on
the server, and every host with the same admin key reads the same sessions. Does not know pages.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from typing import Any, cast

from litestar import Request
from litestar.connection import ASGIConnection
from litestar.exceptions import NotAuthorizedException, PermissionDeniedException
from litestar.handlers import BaseRouteHandler
from litestar.middleware import DefineMiddleware
from litestar.middleware.session import SessionMiddleware
from litestar.middleware.session.client_side import ClientSideSessionBackend, CookieBackendConfig
from litestar.types import ASGIApp

ADMIN_PATH = "/admin"
OPEN_TO_ALL = "open_to_all"  # the `opt` of handlers that need no sign-in
TOKEN_FIELD = "form_token"
SESSION_LIFE_S = 12 * 3600
TRIES_AT_ONCE = 5
TRY_AGAIN_AFTER_S = 60.0
REMEMBERED_CLIENTS = 10_000
AnyRequest = Request[Any, Any, Any]


class SignedOut(NotAuthorizedException):
    """The page needs a sign-in."""


def cookie_session(admin_key: str, public_url: str) -> DefineMiddleware:
    """The session of this admin key; changing the key signs everybody out.

    The cookie is given to strangers too, who could try keys against it at home: scrypt (RFC 7914) makes each try dear.
    """
    secret = hashlib.scrypt(admin_key.encode(), salt=b"zimage admin session", n=2**14, r=8, p=1, dklen=32)
    config = CookieBackendConfig(
        secret=secret,
        key="zimage_admin",
        path=ADMIN_PATH,
        max_age=SESSION_LIFE_S,
        secure=public_url.startswith("https://"),
        httponly=True,
        samesite="strict",
    )
    return DefineMiddleware(_session, config=config)


async def admit(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """The guard of every admin page. Raises `SignedOut`, or `PermissionDeniedException` for a form of elsewhere."""
    if not handler.opt.get(OPEN_TO_ALL) and not is_signed_in(connection):
        raise SignedOut
    request = cast(AnyRequest, connection)  # Litestar hands guards the request itself
    if request.method == "POST":
        form = await request.form()
        given, expected = str(form.get(TOKEN_FIELD, "")), str(request.session.get("token", ""))
        if not expected or not hmac.compare_digest(given.encode(), expected.encode()):
            raise PermissionDeniedException("This form is no longer valid. Go back, reload the page and try again.")


def is_signed_in(connection: ASGIConnection[Any, Any, Any, Any]) -> bool:
    """Whether the session was signed in, and less than 12 hours ago: using it does not lengthen it."""
    return connection.session.get("ends_at", 0.0) > time.time()


def sign_in(request: AnyRequest) -> str:
    """Begins a session with a form token of its own. Gives the address that was wanted before."""
    wanted = str(request.session.get("wanted", ADMIN_PATH))
    request.session.clear()
    request.session["ends_at"] = time.time() + SESSION_LIFE_S
    return wanted


def sign_out(request: AnyRequest) -> None:
    """Ends the session in this browser."""
    request.session.clear()


def want(request: AnyRequest) -> None:
    """Remembers the address asked for, to go there after signing in."""
    if request.method == "GET":
        query = request.url.query
        request.session["wanted"] = f"{request.url.path}?{query}" if query else request.url.path


def form_token(request: AnyRequest) -> str:
    """The token that forms of this session carry; another site can neither read nor guess it."""
    return str(request.session.setdefault("token", secrets.token_urlsafe(24)))


def notify(request: AnyRequest, text: str, *, refused: bool = False) -> None:
    """One sentence for the next page."""
    request.session["notice"] = {"text": text, "refused": refused}


def take_notice(request: AnyRequest) -> dict[str, Any] | None:
    """That sentence, once."""
    return request.session.pop("notice", None)


class FailedTries:
    """A brake on guessing the key: after five wrong tries a client waits until a minute after the first of them.

    Counted in this process; forgotten when it ends.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._clients: dict[str, tuple[float, int]] = {}  # the end of the minute, and the tries in it

    def wait_s(self, client: str) -> float:
        """How long the client has to wait; 0 when it may try."""
        ends_at, tries = self._clients.get(client, (0.0, 0))
        return max(0.0, ends_at - self._clock()) if tries >= TRIES_AT_ONCE else 0.0

    def count(self, client: str) -> None:
        """The client gave a wrong key."""
        now = self._clock()
        ends_at, tries = self._clients.get(client, (0.0, 0))
        if ends_at <= now:
            ends_at, tries = now + TRY_AGAIN_AFTER_S, 0
        self._clients[client] = (ends_at, tries + 1)
        if len(self._clients) > REMEMBERED_CLIENTS:
            self._clients = {name: entry for name, entry in self._clients.items() if entry[0] > now}


def _session(app: ASGIApp, config: CookieBackendConfig) -> SessionMiddleware[ClientSideSessionBackend]:
    """Made for each route: a router copies its middleware, and a cipher cannot be copied."""
    return SessionMiddleware(app, ClientSideSessionBackend(config))
