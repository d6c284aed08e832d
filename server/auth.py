"""Who is calling: the owner of an API key, or, where no keys are configured, anybody on this very machine.

Takes a connection; gives the owner's name, which every job carries. The admin's session is in `pages`. Does not know
jobs.
"""

import hmac
import ipaddress
from typing import Any
from urllib.parse import urlsplit

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from zcore.errors import Unauthorized
from zcore.settings import ServerSettings

LOCAL_OWNER = "local"
Connection = ASGIConnection[Any, Any, Any, Any]


class Callers:
    """The configured keys. With none, callers on the loopback interface are let in as `local`, and nobody else."""

    def __init__(self, settings: ServerSettings) -> None:
        self._keys = {name: key.encode() for name, key in settings.api_keys.items()}

    def owner(self, connection: Connection) -> str:
        """The caller's name. Raises `Unauthorized`."""
        if not self._keys:
            if _is_local(connection):
                return LOCAL_OWNER
            raise Unauthorized("no API keys are configured, so only callers on this machine are let in")
        given = _given_key(connection).encode()
        if not given:
            raise Unauthorized("a valid API key is needed, as `Authorization: Bearer KEY`")
        # Every key is compared, so that the time tells nothing.
        fitting = [name for name, key in self._keys.items() if hmac.compare_digest(key, given)]
        if not fitting:
            raise Unauthorized("a valid API key is needed, as `Authorization: Bearer KEY`")
        return fitting[0]


def callers_only(connection: Connection, _: BaseRouteHandler) -> None:
    """A guard that refuses strangers before anything of their body is read. Raises `Unauthorized`.

    The application has its `Callers` as `state.callers`.
    """
    callers: Callers = connection.app.state.callers
    callers.owner(connection)


def admin_only(connection: Connection, _: BaseRouteHandler) -> None:
    """A guard that lets in who gives the admin key, as `Authorization: Bearer KEY`. Raises `Unauthorized`.

    The application has that key as `state.admin_key`.
    """
    admin_key: str = connection.app.state.admin_key
    if not hmac.compare_digest(_given_key(connection).encode(), admin_key.strip().encode()):
        raise Unauthorized("the admin key is needed, as `Authorization: Bearer KEY`")


def _given_key(connection: Connection) -> str:
    scheme, _, key = connection.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _is_local(connection: Connection) -> bool:
    """Connected from this machine, under a name of this machine.

    A forwarded request comes from elsewhere, whatever its last hop. Another name means a page of another site, whose
    owner lets that name lead here (DNS rebinding).
    """
    forwarded = "forwarded" in connection.headers or "x-forwarded-for" in connection.headers
    if connection.client is None or forwarded:
        return False
    name = urlsplit(f"//{connection.headers.get('host', '')}").hostname or ""
    return _is_loopback(connection.client.host) and (name == "localhost" or _is_loopback(name))


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
