"""Authentication of requests to the API: by an API key, by the admin key, or keyless.

Takes a connection; returns the `Caller`, whose name every job carries as its owner. The admin's session is in
`server.admin.sessions`. Does not depend on jobs.
"""

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from server import keyless
from server.key_guesses import KeyGuesses
from zcore.errors import Unauthorized
from zcore.keys import LOCAL_OWNER

API_KEY_REQUIRED = "a valid API key is required, as `Authorization: Bearer KEY`"
ADMIN_KEY_REQUIRED = "the admin key is required, as `Authorization: Bearer KEY`"
Connection = ASGIConnection[Any, Any, Any, Any]


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated caller. `name` owns the jobs that it submits."""

    name: str


class Callers:
    """The keys that requests may present. Without API keys, the machine's user is accepted as the caller `local`."""

    def __init__(self, api_keys: Mapping[str, str], admin_key: str, guesses: KeyGuesses) -> None:
        """Take the API keys by owner; none means keyless."""
        self._keys = {name: key.strip() for name, key in api_keys.items()}
        self._admin_key = admin_key.strip()
        self._guesses = guesses

    def identify(self, connection: Connection) -> Caller:
        """Return the caller of this connection. Raises `Unauthorized`, and `TooManyWrongKeys` for a guesser."""
        if not self._keys:
            reason = keyless.objection(connection)
            if reason is None:
                return Caller(LOCAL_OWNER)
            raise Unauthorized(f"{reason}; this service is keyless (server.keyless), for its own user on its machine")
        given = _bearer_key(connection)
        # Every key is compared, so that the response time reveals nothing.
        matches = [name for name, key in self._keys.items() if _equal(key, given)]
        self._judge(connection, "api_key", given, bool(matches), API_KEY_REQUIRED)
        return Caller(matches[0])

    def require_admin_key(self, connection: Connection) -> None:
        """Raise `Unauthorized` unless the request presents the admin key, and `TooManyWrongKeys` for a guesser."""
        given = _bearer_key(connection)
        self._judge(connection, "admin_key", given, _equal(self._admin_key, given), ADMIN_KEY_REQUIRED)

    def is_admin_key(self, connection: Connection, given: str) -> bool:
        """Return whether this is the admin key, for the sign-in form. Raises `TooManyWrongKeys` for a guesser."""
        is_right = _equal(self._admin_key, given.strip())
        self._guesses.judge(_address(connection), "sign_in", given, is_right)
        return is_right

    def _judge(self, connection: Connection, kind: str, given: str, is_right: bool, refusal: str) -> None:
        if given:
            self._guesses.judge(_address(connection), kind, given, is_right)
        if not is_right:
            raise Unauthorized(refusal)


def caller_of(connection: Connection) -> Caller:
    """Return the caller of a request, whom the first call identifies. Raises as `Callers.identify` does.

    The application's `Callers` are in `state.callers`.
    """
    known: Caller | None = connection.state.get("caller")
    if known is None:
        callers: Callers = connection.app.state.callers
        known = connection.state.caller = callers.identify(connection)
    return known


def callers_only(connection: Connection, _: BaseRouteHandler) -> None:
    """Guard: refuse unknown callers before their body is read. Raises `Unauthorized`."""
    caller_of(connection)


def admin_only(connection: Connection, _: BaseRouteHandler) -> None:
    """Guard: require the admin key, as `Authorization: Bearer KEY`. Raises `Unauthorized`.

    The application's `Callers` are in `state.callers`.
    """
    callers: Callers = connection.app.state.callers
    callers.require_admin_key(connection)


def _bearer_key(connection: Connection) -> str:
    scheme, _, key = connection.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _equal(key: str, given: str) -> bool:
    return hmac.compare_digest(key.encode(), given.encode())


def _address(connection: Connection) -> str:
    return connection.client.host if connection.client else ""
