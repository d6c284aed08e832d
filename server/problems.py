"""Errors as HTTP responses: one RFC 9457 `application/problem+json` shape for all of them.

Takes our errors and Litestar's; returns `type, title, status, detail, instance, code, request_id` and, for invalid
input, `errors` with the place of each: a JSON pointer into the body, or the name of a header or query parameter. An
unexpected error is logged and answered as 500 without its text. Does not depend on routes. Reads only what cannot fail
of the request, because a handler that fails answers nothing.
"""

import re
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any, cast

from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException
from litestar.openapi.datastructures import ResponseSpec

from server.parameters import parameters_of
from server.schemas import Problem
from zcore import errors
from zcore.errors import FieldError, InvalidRequest, ZImageError
from zcore.foreign_text import shortened
from zcore.jobs.database import DatabaseError, temporary_fault
from zcore.telemetry import log

MEDIA_TYPE = "application/problem+json"
STATUS: dict[type[ZImageError], HTTPStatus] = {
    errors.KeyReused: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.InvalidRequest: HTTPStatus.BAD_REQUEST,
    errors.Unauthorized: HTTPStatus.UNAUTHORIZED,
    errors.TooManyWrongKeys: HTTPStatus.TOO_MANY_REQUESTS,
    errors.InvalidLink: HTTPStatus.FORBIDDEN,
    errors.NotFound: HTTPStatus.NOT_FOUND,
    errors.Conflict: HTTPStatus.CONFLICT,
    errors.Gone: HTTPStatus.GONE,
    errors.Overloaded: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.StorageError: HTTPStatus.SERVICE_UNAVAILABLE,
}
# Codes of the framework's own refusals. Not derived from the names in `HTTPStatus`, which differ between Pythons.
CODES = {
    HTTPStatus.BAD_REQUEST: InvalidRequest.code,
    HTTPStatus.NOT_FOUND: errors.NotFound.code,
    HTTPStatus.METHOD_NOT_ALLOWED: "method_not_allowed",
    HTTPStatus.REQUEST_TIMEOUT: "request_timeout",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "body_too_large",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "unsupported_media_type",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: "headers_too_large",
    HTTPStatus.SERVICE_UNAVAILABLE: errors.Overloaded.code,
}
# Patterns of the framework's messages about query parameters and headers, each with the message that callers get.
PARAMETER_DETAILS = (
    (r"Expected `int` >= (\d+)", r"must be at least \1"),
    (r"Expected `int` <= (\d+)", r"must be at most \1"),
    (r"Expected `int`.*", r"must be a whole number"),
    (r"Expected `str` of length >= (\d+)", r"must have at least \1 characters"),
    (r"Expected `str` of length <= (\d+)", r"must have at most \1 characters"),
    (r"Invalid enum value (.+)", r"\1 is not an allowed value"),
    (r"Invalid RFC3339.*", r"must be an ISO 8601 date and time, such as 2030-01-31T18:00:00Z"),
)
DATABASE_RETRY_AFTER_S = 5
OVERLOADED_RETRY_AFTER_S = 5
MAX_TEXT_CHARACTERS = 2000
"""The longest text of a problem. Longer ones quote what the caller sent, who has it already."""
AnyRequest = Request[Any, Any, Any]


def refusal(description: str) -> ResponseSpec:
    """Declare a problem+json response in a route's OpenAPI description."""
    return ResponseSpec(Problem, description=description, media_type=MEDIA_TYPE)


def status_of(error: ZImageError) -> HTTPStatus:
    """Return the status of the error's nearest mapped class; 500 for errors that no request can cause."""
    for kind in type(error).__mro__:
        if kind in STATUS:
            return STATUS[kind]
    return HTTPStatus.INTERNAL_SERVER_ERROR


def problem_document(
    path: str | None,
    status: HTTPStatus,
    code: str,
    detail: str,
    fields: Sequence[FieldError] = (),
    request_id: str = "",
) -> dict[str, Any]:
    """Return the JSON of a problem. Its size is bounded, whatever the caller sent.

    `path` is None if the request was not understood well enough to have one.
    """
    document: dict[str, Any] = {
        "type": f"urn:zimage:problem:{code}",
        "title": status.phrase,
        "status": int(status),
        "detail": shortened(detail, MAX_TEXT_CHARACTERS),
        "code": code,
        "request_id": request_id,
    }
    if path is not None:
        document["instance"] = shortened(path, MAX_TEXT_CHARACTERS)
    if fields:
        document["errors"] = [_entry(field) for field in fields]
    return document


def _entry(field: FieldError) -> dict[str, str]:
    place = {"pointer": field.pointer} if field.where == "body" else {"name": field.pointer.removeprefix("/")}
    return {"in": field.where, **place, "detail": field.detail}


def _from_zimage_error(request: AnyRequest, error: ZImageError) -> Response[dict[str, Any]]:
    fields = error.errors if isinstance(error, InvalidRequest) else []
    headers: dict[str, str] = {}
    if isinstance(error, errors.Unauthorized):
        headers = {"www-authenticate": "Bearer"}
    elif isinstance(error, errors.TooManyWrongKeys):
        headers = {"retry-after": str(error.wait_s)}
    elif isinstance(error, errors.Overloaded):
        headers = {"retry-after": str(OVERLOADED_RETRY_AFTER_S)}
    return _problem(request, status_of(error), error.code, error.message, fields, headers)


def _from_litestar(request: AnyRequest, error: HTTPException) -> Response[dict[str, Any]]:
    """Translate the framework's refusals: unknown paths and methods, unreadable JSON, wrong query parameters."""
    status = HTTPStatus(error.status_code)
    headers = {name: value for name, value in (error.headers or {}).items() if name.lower() != "content-type"}
    if isinstance(error, ValidationException):
        found = cast(list[dict[str, Any]], error.extra or [])
        if any(entry.get("key") == "data" for entry in found):
            return _problem(request, status, InvalidRequest.code, "the body must be a JSON object", [], headers)
        fields = [_parameter_error(request, entry) for entry in found]
        detail = InvalidRequest(fields).message or error.detail
        return _problem(request, status, InvalidRequest.code, detail, fields, headers)
    fields = [entry for entry in cast(list[Any], error.extra or []) if isinstance(entry, FieldError)]
    return _problem(request, status, CODES.get(status, "refused"), error.detail, fields, headers)


def _parameter_error(request: AnyRequest, entry: dict[str, Any]) -> FieldError:
    """Translate the framework's error of one parameter, which it names after the handler's argument."""
    handler = cast(dict[str, Any], request.scope).get("route_handler")
    argument, detail = str(entry.get("key", "")), _plain(str(entry.get("message", "")))
    parameter = parameters_of(handler).get(argument) if handler else None
    return (
        FieldError(f"/{parameter.name}", detail, parameter.where) if parameter else FieldError(f"/{argument}", detail)
    )


def _plain(message: str) -> str:
    """Reword a message of the framework for callers. An unknown message is returned unchanged."""
    for pattern, detail in PARAMETER_DETAILS:
        if found := re.fullmatch(pattern, message):
            return found.expand(detail)
    return message


def _from_recursion(request: AnyRequest, _: RecursionError) -> Response[dict[str, Any]]:
    """Translate the JSON decoder's failure on deep nesting; no other code here recurses as deeply as its input."""
    detail = "the body is nested too deeply"
    return _problem(request, HTTPStatus.BAD_REQUEST, InvalidRequest.code, detail, [], {})


def _from_database(request: AnyRequest, error: DatabaseError) -> Response[dict[str, Any]]:
    """Answer 503 if the fault is not the request's: the caller may retry, safely with an Idempotency-Key."""
    reason = temporary_fault(error)
    if reason is None:
        return _from_unexpected(request, error)
    log.error("request.database_unavailable", method=request.method, path=request.scope["path"], reason=reason)
    detail = f"the database cannot serve this request at the moment; try again in {DATABASE_RETRY_AFTER_S} s"
    headers = {"retry-after": str(DATABASE_RETRY_AFTER_S)}
    return _problem(request, HTTPStatus.SERVICE_UNAVAILABLE, "database_unavailable", detail, [], headers)


def _from_unexpected(request: AnyRequest, error: Exception) -> Response[dict[str, Any]]:
    log.error("request.crashed", method=request.method, path=request.scope["path"], exc_info=error)
    detail = "an unexpected error occurred; see the server's log for details"
    return _problem(request, HTTPStatus.INTERNAL_SERVER_ERROR, ZImageError.code, detail, [], {})


def _problem(
    request: AnyRequest,
    status: HTTPStatus,
    code: str,
    detail: str,
    fields: list[FieldError],
    headers: dict[str, str],
) -> Response[dict[str, Any]]:
    request_id = cast(dict[str, Any], request.scope).get("request_id", "")
    content = problem_document(request.scope["path"], status, code, detail, fields, request_id)
    return Response(content, status_code=int(status), media_type=MEDIA_TYPE, headers=headers)


EXCEPTION_HANDLERS: dict[int | type[Exception], Callable[[AnyRequest, Any], Response[dict[str, Any]]]] = {
    ZImageError: _from_zimage_error,
    HTTPException: _from_litestar,
    RecursionError: _from_recursion,
    DatabaseError: _from_database,
    Exception: _from_unexpected,
}
