"""Errors as HTTP says them: RFC 9457 `application/problem+json`, one shape for all.

Takes our errors and Litestar's; gives `type, title, status, detail, instance, code` and, for wrong input, `errors` with
one JSON pointer a field. An unexpected error is logged and answered as 500 without its text. Does not know routes.
"""

from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast

from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException
from litestar.openapi.datastructures import ResponseSpec
from sqlalchemy import exc as database_errors

from server.schemas import Problem
from zcore import errors
from zcore.errors import FieldError, InvalidRequest, ZImageError
from zcore.telemetry import log

MEDIA_TYPE = "application/problem+json"
STATUS: dict[type[ZImageError], HTTPStatus] = {
    errors.KeyReused: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.InvalidRequest: HTTPStatus.BAD_REQUEST,
    errors.Unauthorized: HTTPStatus.UNAUTHORIZED,
    errors.InvalidLink: HTTPStatus.FORBIDDEN,
    errors.NotFound: HTTPStatus.NOT_FOUND,
    errors.Conflict: HTTPStatus.CONFLICT,
    errors.Gone: HTTPStatus.GONE,
    errors.StorageError: HTTPStatus.SERVICE_UNAVAILABLE,
}
# What the framework refuses by itself. Python's names of these statuses change between its versions.
CODES = {
    HTTPStatus.BAD_REQUEST: InvalidRequest.code,
    HTTPStatus.NOT_FOUND: errors.NotFound.code,
    HTTPStatus.METHOD_NOT_ALLOWED: "method_not_allowed",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "body_too_large",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "unsupported_media_type",
}
DATABASE_BACK_S = 5
AnyRequest = Request[Any, Any, Any]


def refusal(description: str) -> ResponseSpec:
    """How a route's description declares an answer in problem+json."""
    return ResponseSpec(Problem, description=description, media_type=MEDIA_TYPE)


def problem_of(request: AnyRequest, fault: ZImageError) -> Response[dict[str, Any]]:
    """Our own error."""
    fields = fault.errors if isinstance(fault, InvalidRequest) else []
    headers = {"www-authenticate": "Bearer"} if isinstance(fault, errors.Unauthorized) else {}
    return _problem(request, status_of(fault), fault.code, fault.message, fields, headers)


def status_of(fault: ZImageError) -> HTTPStatus:
    """The status of an error's nearest mapped class; 500 for those that no request can cause."""
    for kind in type(fault).__mro__:
        if kind in STATUS:
            return STATUS[kind]
    return HTTPStatus.INTERNAL_SERVER_ERROR


def _of_litestar(request: AnyRequest, fault: HTTPException) -> Response[dict[str, Any]]:
    """What the framework refuses: unknown paths and methods, unreadable JSON, wrong query parameters."""
    status = HTTPStatus(fault.status_code)
    headers = {name: value for name, value in (fault.headers or {}).items() if name.lower() != "content-type"}
    if isinstance(fault, ValidationException):
        found = cast(list[dict[str, Any]], fault.extra or [])
        if any(entry.get("key") == "data" for entry in found):
            return _problem(request, status, InvalidRequest.code, "the body has to be a JSON object", [], headers)
        fields = [FieldError(f"/{entry.get('key', '')}", str(entry.get("message", ""))) for entry in found]
        detail = InvalidRequest(fields).message or fault.detail
        return _problem(request, status, InvalidRequest.code, detail, fields, headers)
    return _problem(request, status, CODES.get(status, "refused"), fault.detail, [], headers)


def _of_nesting(request: AnyRequest, _: RecursionError) -> Response[dict[str, Any]]:
    """JSON that is nested too deeply to be read; nothing else here recurses by what a caller sent."""
    detail = "the body is nested too deeply"
    return _problem(request, HTTPStatus.BAD_REQUEST, InvalidRequest.code, detail, [], {})


def _of_database(request: AnyRequest, fault: database_errors.SQLAlchemyError) -> Response[dict[str, Any]]:
    """503 where the database does not answer: a caller may come back, and an Idempotency-Key makes that safe."""
    gone = (database_errors.OperationalError, database_errors.InterfaceError, database_errors.TimeoutError)
    if not isinstance(fault, gone):
        return _of_anything(request, fault)
    log.error("request.without_database", method=request.method, path=request.url.path, error=type(fault).__name__)
    detail = f"the database does not answer; try again in {DATABASE_BACK_S} s"
    headers = {"retry-after": str(DATABASE_BACK_S)}
    return _problem(request, HTTPStatus.SERVICE_UNAVAILABLE, "database_unavailable", detail, [], headers)


def _of_anything(request: AnyRequest, fault: Exception) -> Response[dict[str, Any]]:
    log.error("request.crashed", method=request.method, path=request.url.path, exc_info=fault)
    detail = "the server failed unexpectedly; its log says why"
    return _problem(request, HTTPStatus.INTERNAL_SERVER_ERROR, ZImageError.code, detail, [], {})


def _problem(
    request: AnyRequest,
    status: HTTPStatus,
    code: str,
    detail: str,
    fields: list[FieldError],
    headers: dict[str, str],
) -> Response[dict[str, Any]]:
    content: dict[str, Any] = {
        "type": f"urn:zimage:problem:{code}",
        "title": status.phrase,
        "status": int(status),
        "detail": detail,
        "instance": request.url.path,
        "code": code,
    }
    if fields:
        content["errors"] = [{"pointer": field.pointer, "detail": field.detail} for field in fields]
    return Response(content, status_code=int(status), media_type=MEDIA_TYPE, headers=headers)


EXCEPTION_HANDLERS: dict[int | type[Exception], Callable[[AnyRequest, Any], Response[dict[str, Any]]]] = {
    ZImageError: problem_of,
    HTTPException: _of_litestar,
    RecursionError: _of_nesting,
    database_errors.SQLAlchemyError: _of_database,
    Exception: _of_anything,
}
