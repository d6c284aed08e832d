"""Errors as HTTP says them: RFC 9457 `application/problem+json`, one shape for all.

Takes our errors and Litestar's; gives `type, title, status, detail, instance, code` and, for wrong input, `errors` with
one JSON pointer a field. An unexpected error is logged and answered as 500 without its text. Does not know routes.
"""

from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast

from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException

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
AnyRequest = Request[Any, Any, Any]


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
        fields = [FieldError(f"/{entry.get('key', '')}", str(entry.get("message", ""))) for entry in found]
        detail = InvalidRequest(fields).message or fault.detail
        return _problem(request, status, InvalidRequest.code, detail, fields, headers)
    code = InvalidRequest.code if status == HTTPStatus.BAD_REQUEST else status.name.lower()
    return _problem(request, status, code, fault.detail, [], headers)


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
    Exception: _of_anything,
}
