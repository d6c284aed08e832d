"""The first page, with links to everything else, and the reference of the API for people.

Both are public, and load nothing from other hosts.
"""

from typing import Any

from litestar import Request, get
from litestar.enums import MediaType
from litestar.response import Response, Template

from server.api_reference import sections
from server.pages import page_headers

LINKS = {
    "playground": "/playground",
    "reference": "/docs",
    "openapi": "/schema/openapi.json",
    "admin": "/admin",
    "health": "/health/ready",
}
"""Where the parts of the service are, for people and programs that know only its address."""


@get("/", include_in_schema=False, sync_to_thread=False)
def start(request: Request[Any, Any, Any]) -> Template | Response[dict[str, str]]:
    """Show links to all parts of the service; to a client that does not ask for HTML, as JSON."""
    if request.accept.best_match([MediaType.JSON, MediaType.HTML]) == MediaType.HTML:
        return Template("start.html", context={"links": LINKS}, headers=page_headers([]))
    return Response(LINKS)


@get("/docs", include_in_schema=False, sync_to_thread=True)
def reference(request: Request[Any, Any, Any]) -> Template:
    """Show every operation of the OpenAPI document: what it does, takes and answers."""
    document = request.app.openapi_schema.to_schema()
    return Template(
        "reference.html",
        context={"title": document["info"]["title"], "sections": sections(document)},
        headers=page_headers([]),
    )
