"""Of what kind a body may be, by the name that it comes with: guards, and what OpenAPI says of a file.

A page of another site can make a browser post to this machine, but only as one of the few kinds that forms have; any
other needs this service's leave, which it never gives. So no route takes one of those few.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from litestar.connection import ASGIConnection
from litestar.exceptions import HTTPException
from litestar.handlers import BaseRouteHandler
from litestar.openapi.spec import OpenAPIMediaType, OpenAPIType, Operation, RequestBody, Schema
from litestar.openapi.spec.enums import OpenAPIFormat

Guard = Callable[[ASGIConnection[Any, Any, Any, Any], BaseRouteHandler], None]


def body_of(description: str, *kinds: str) -> type[Operation]:
    """A file as a route's body in OpenAPI; Litestar describes only bodies that it reads itself."""

    @dataclass
    class FileOperation(Operation):
        def __post_init__(self) -> None:
            file = OpenAPIMediaType(Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.BINARY))
            self.request_body = RequestBody(dict.fromkeys(kinds, file), description, required=True)

    return FileOperation


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
