"""Guards on a body's media type and encoding, and the OpenAPI description of a body.

A page of another site can make a browser post to this machine, but only with the few media types that HTML forms can
send; any other type needs permission by CORS, which this service never grants. So no API route that reads a body
accepts a form's media type.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from litestar.connection import ASGIConnection
from litestar.exceptions import HTTPException
from litestar.handlers import BaseRouteHandler
from litestar.openapi.spec import (
    Example,
    OpenAPIHeader,
    OpenAPIMediaType,
    OpenAPIResponse,
    OpenAPIType,
    Operation,
    Reference,
    RequestBody,
    Schema,
)
from litestar.openapi.spec.enums import OpenAPIFormat

from server.schemas import SUBMISSION_EXAMPLES, SubmissionBody
from zcore.errors import FieldError


def _headers(descriptions: dict[str, str]) -> dict[str, OpenAPIHeader | Reference]:
    return {
        name: OpenAPIHeader(schema=Schema(type=OpenAPIType.STRING), description=description, required=True)
        for name, description in descriptions.items()
    }


FILE_HEADERS = _headers(
    {
        "ETag": "Changes if the file does",
        "Last-Modified": "When the file was stored, as an HTTP date",
        "Content-Length": "Size of the body in bytes",
    }
)
RANGE_HEADERS = {
    "206": _headers({"Content-Range": "Which bytes these are, and the file's size: `bytes 0-99/1000`"}),
    "416": _headers({"Content-Range": "The file's size: `bytes */1000`"}),
}
Guard = Callable[[ASGIConnection[Any, Any, Any, Any], BaseRouteHandler], None]


@dataclass
class SubmissionOperation(Operation):
    """An operation whose body is a submission."""

    def __post_init__(self) -> None:
        schema = Reference(f"#/components/schemas/{SubmissionBody.__name__}")
        examples: dict[str, Example | Reference] = {
            name: Example(value=value) for name, value in SUBMISSION_EXAMPLES.items()
        }
        self.request_body = RequestBody(
            {"application/json": OpenAPIMediaType(schema, examples=examples)}, required=True
        )


@dataclass
class ImageOperation(Operation):
    """An operation that answers 200 with an image file, and 206 or 416 to a range."""

    def __post_init__(self) -> None:
        image = OpenAPIMediaType(Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.BINARY))
        success = OpenAPIResponse("The image", headers=dict(FILE_HEADERS), content={"image/*": image})
        self.responses = {**(self.responses or {}), "200": success}
        for status, headers in RANGE_HEADERS.items():
            declared = self.responses[status]
            assert isinstance(declared, OpenAPIResponse)
            declared.headers = headers


def file_body(description: str, *media_types: str) -> type[Operation]:
    """Describe a route's body as a file."""

    @dataclass
    class FileOperation(Operation):
        def __post_init__(self) -> None:
            file = OpenAPIMediaType(Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.BINARY, min_length=1))
            self.request_body = RequestBody(dict.fromkeys(media_types, file), description, required=True)

    return FileOperation


def only(*media_types: str) -> Guard:
    """Return a guard that refuses a body of any other media type with 415. `image/*` allows every image type.

    A compressed body is refused too (RFC 9110, section 15.5.16): a small one could expand to any size.
    """

    def refuse_others(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
        given = connection.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not any(_matches(given, allowed) for allowed in media_types):
            actual = f"not {given}" if given else "but the request has none"
            raise _unsupported("Content-Type", f"must be {' or '.join(media_types)}, {actual}", {})
        encoding = connection.headers.get("content-encoding", "").strip().lower()
        if encoding not in ("", "identity"):
            detail = f"must be identity or absent, not {encoding}: send the body uncompressed"
            raise _unsupported("Content-Encoding", detail, {"accept-encoding": "identity"})

    return refuse_others


def forms_only(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """Guard: refuse a body that is not a plain HTML form.

    No page has a form with files, and the framework's parser of those fails on some that are malformed.
    """
    if "content-type" in connection.headers:
        only("application/x-www-form-urlencoded")(connection, handler)


def _unsupported(header: str, detail: str, headers: dict[str, str]) -> HTTPException:
    fields: list[Any] = [FieldError(f"/{header}", detail, "header")]
    return HTTPException(status_code=415, detail=f"{header} {detail}", headers=headers, extra=fields)


def _matches(given: str, allowed: str) -> bool:
    prefix = allowed.removesuffix("*")
    return given == allowed if prefix == allowed else given.startswith(prefix) and given != prefix
