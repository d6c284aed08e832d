"""Guards of what kind a body may be, by the name that it comes with.

A page of another site can make a browser post to this machine, but only as one of the few kinds that forms have; any
other needs this service's leave, which it never gives. So no route takes one of those few.
"""

from collections.abc import Callable
from typing import Any

from litestar.connection import ASGIConnection
from litestar.exceptions import HTTPException
from litestar.handlers import BaseRouteHandler

Guard = Callable[[ASGIConnection[Any, Any, Any, Any], BaseRouteHandler], None]


def only(*kinds: str) -> Guard:
    """Refuses a body of any other media type with 415. `image/*` stands for all that begin so."""

    def refuse_others(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
        given = connection.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not any(_fits(given, kind) for kind in kinds):
            detail = f"the body has to be {' or '.join(kinds)}, not {given or 'unnamed'}"
            raise HTTPException(status_code=415, detail=detail)

    return refuse_others


def _fits(given: str, kind: str) -> bool:
    group = kind.removesuffix("*")
    return given == kind if group == kind else given.startswith(group) and given != group
