"""Rendering of admin pages, and of errors as pages."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from litestar import Request, Response
from litestar.response import Template

from server.admin.sessions import ADMIN_PATH, form_token, take_notice
from server.pages import page_headers

AnyRequest = Request[Any, Any, Any]


def render(
    request: AnyRequest,
    template: str,
    context: Mapping[str, Any],
    image_urls: Sequence[str] = (),
    *,
    status_code: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Template:
    """Render a page with the session's form token and pending notice. The page may show images from `image_urls`."""
    session = {"form_token": form_token(request), "notice": take_notice(request)}
    all_headers = {**page_headers(image_urls), **(headers or {})}
    return Template(template, context={**context, **session}, status_code=status_code, headers=all_headers)


def with_error_pages(
    handlers: Mapping[int | type[Exception], Callable[[AnyRequest, Any], Response[dict[str, Any]]]],
) -> dict[int | type[Exception], Callable[[AnyRequest, Any], Response[Any]]]:
    """Wrap exception handlers so that they answer requests below `/admin` with an HTML page."""
    return {kind: _with_error_page(handler) for kind, handler in handlers.items()}


def _with_error_page(handler: Callable[[AnyRequest, Any], Response[dict[str, Any]]]) -> Callable[..., Response[Any]]:
    def answer(request: AnyRequest, error: Any) -> Response[Any]:
        problem = handler(request, error)
        path = request.scope["path"]
        if path != ADMIN_PATH and not path.startswith(f"{ADMIN_PATH}/"):
            return problem
        context = {"title": problem.content["title"], "detail": problem.content["detail"]}
        headers = page_headers(()) | problem.headers
        return Template("error.html", context=context, status_code=problem.content["status"], headers=headers)

    return answer
