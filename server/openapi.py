"""The OpenAPI document, from the routes and from the structs that read requests and write responses.

Litestar describes paths and parameters. This module adds what it does not know: msgspec's own schemas, the keys that a
route requires, the problems that it may answer, response headers and webhooks. It lists no routes or fields itself,
so a new one appears in the document by itself.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, cast, get_args

import msgspec
from litestar import Response, Router
from litestar.handlers import HTTPRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, OpenAPI, SecurityScheme, Server, Tag
from litestar.routes import BaseRoute, HTTPRoute
from litestar.types import Method
from litestar.types.internal_types import PathParameterDefinition
from litestar.typing import FieldDefinition

from server.callers import admin_only, callers_only
from server.problems import MEDIA_TYPE
from server.schemas import Problem, SubmissionBody
from zcore.errors import NotFound
from zcore.jobs.resource import STORED_SHAPES, WebhookPayload, WebhookType
from zcore.request import Dype, GenerationDefaults, GenerationRequest, SkipLayerGuidance
from zcore.settings import Settings

Document = dict[str, Any]

DESCRIPTION = """Submit a prompt, follow the job and fetch the image, or be notified by a signed webhook.

Every refusal is a problem (RFC 9457) with a stable `code`. The URLs of a job are in the job."""
TAGS = {
    "jobs": "Submit image generations, follow them, and fetch the images.",
    "inputs": "Upload images to start from.",
    "prompts": "Prompt templates, and prompts as the model reads them.",
    "sizes": "Image sizes by name.",
    "loras": "The LoRA library.",
    "health": "Liveness and readiness of the process.",
}
PROBLEMS = {
    400: "The body, a parameter or a header is invalid; `errors` names each",
    401: "The key is missing or wrong",
    404: "There is no such resource, or it is another caller's",
    408: "The body stalled or arrived too slowly",
    413: "The body is too large",
    415: "The body has another media type",
    429: "Too many wrong keys came from this address",
    500: "The service failed unexpectedly; its log has the cause",
    503: "The service has too much to do, or its database or storage does not answer",
}
"""Problems that routes share. A route states its own text for a status with `problems.refusal`."""
_RETRY_AFTER = {"description": "Seconds to wait before trying again", "schema": {"type": "integer"}}
PROBLEM_HEADERS: dict[int, Document] = {
    401: {
        "WWW-Authenticate": {"description": "How to present a key", "schema": {"type": "string"}, "required": True},
    },
    429: {"Retry-After": {**_RETRY_AFTER, "required": True}},
    503: {"Retry-After": _RETRY_AFTER},
}
"""Headers of problems, by status."""
REQUEST_ID_HEADER: Document = {
    "X-Request-Id": {
        "description": "The request's own id, or a new one; it is in the server's log",
        "schema": {"type": "string"},
        "required": True,
    }
}
WEBHOOK_HEADERS = {
    "webhook-id": "Id of the event; the same in every attempt",
    "webhook-timestamp": "Unix seconds of this attempt",
    "webhook-signature": "`v1,` and the base64 of HMAC-SHA256 over `{webhook-id}.{webhook-timestamp}.{body}`",
}
ANSWERS_ALWAYS = "check_liveness"
"""The route that is never refused as overloaded."""


def openapi_config(settings: Settings, routes: Callable[[], Sequence[BaseRoute]]) -> OpenAPIConfig:
    """Configure the document at `/schema/openapi.json`. `routes` returns the routes of the application."""

    class Completed(OpenAPI):
        _document: Document | None = None

        def to_schema(self) -> Document:
            if self._document is None:  # made once, because it takes a tenth of a second of CPU time or more
                self._document = _completed(super().to_schema(), routes(), is_open=settings.server.keyless)
            return self._document

    class Config(OpenAPIConfig):
        def to_openapi_schema(self) -> OpenAPI:
            return Completed(**vars(super().to_openapi_schema()))

    schemes = {
        "key": "An API key of a caller",
        "admin_key": "The admin key of the installation",
    }
    return Config(
        title="Z-Image service",
        version=version("zimage"),
        description=DESCRIPTION,
        render_plugins=[JsonRenderPlugin()],
        openapi_router=Router("/schema", route_handlers=[], include_in_schema=False, after_request=_without_page),
        # Without a configured address, a caller's own address of this document is right where ours may not be.
        servers=[Server(settings.public_url if settings.server.public_url else "/")],
        tags=[Tag(name, description=description) for name, description in TAGS.items()],
        use_handler_docstrings=True,
        operation_id_creator=_operation_id,
        components=Components(
            security_schemes={
                name: SecurityScheme(type="http", scheme="bearer", description=description)
                for name, description in schemes.items()
            }
        ),
    )


def _without_page(response: Response[Any]) -> Response[Any]:
    """Replace the framework's page about an unknown path below `/schema` by our problem."""
    if response.status_code == 404:
        raise NotFound("there is only /schema/openapi.json")
    return response


def _operation_id(handler: HTTPRouteHandler, _method: Method, _path: list[str | PathParameterDefinition]) -> str:
    return handler.handler_name


def _completed(document: Document, routes: Iterable[BaseRoute], is_open: bool) -> Document:
    """Return Litestar's document with everything that only this module knows. `is_open`: no caller needs a key."""
    shapes: dict[str, type[msgspec.Struct]] = {shape.__name__: shape for shape in (Problem, WebhookPayload)}
    for route in routes:
        if not isinstance(route, HTTPRoute):
            continue
        for method, (handler, _) in route.route_handler_map.items():
            operation = document["paths"].get(route.path_format, {}).get(method.lower())
            if operation is not None:
                _complete(operation, handler, is_open)
                shapes |= {shape.__name__: shape for shape in _shapes_of(handler)}
    document["components"]["schemas"] |= _request_schemas() | _response_schemas(shapes.values())
    document["webhooks"] = {name: _webhook(name) for name in get_args(WebhookType)}
    return document


def _complete(operation: Document, handler: HTTPRouteHandler, is_open: bool) -> None:
    """Add what Litestar does not know of one operation."""
    uses = set(handler.parsed_fn_signature.parameters)
    guards: Sequence[Any] = cast(Any, handler).guards or ()
    problems = {400, 500}
    if admin_only in guards:
        operation["security"] = [{"admin_key": []}]
        problems |= {401, 429}
    elif "caller" in uses or callers_only in guards:
        operation["security"] = [{}, {"key": []}] if is_open else [{"key": []}]
        problems |= {401, 429}
    else:
        operation["security"] = []
    if operation.get("requestBody"):
        problems |= {408, 413, 415}
    if any(one["in"] == "path" for one in operation.get("parameters", ())):
        problems |= {404}
    if handler.handler_name != ANSWERS_ALWAYS:
        problems |= {503}
    for parameter in operation.get("parameters", ()):
        parameter["schema"] = _without_null(parameter["schema"])
    declared: Document = operation["responses"]
    own = {status: declared[str(status)] for status in (handler.status_code, *(handler.responses or {}))}
    responses = {status: _problem(PROBLEMS[status]) for status in problems} | own
    for status, response in responses.items():
        common: Document = own[handler.status_code].get("headers", {}) if status < 300 else {}
        headers: Document = common | response.get("headers", {})
        if MEDIA_TYPE in response.get("content", {}):
            headers = PROBLEM_HEADERS.get(status, {})
        response["headers"] = dict(sorted({**headers, **REQUEST_ID_HEADER}.items()))
    operation["responses"] = {str(status): response for status, response in sorted(responses.items())}


def _problem(description: str) -> Document:
    content = {MEDIA_TYPE: {"schema": {"$ref": f"#/components/schemas/{Problem.__name__}"}}}
    return {"description": description, "content": content}


def _webhook(name: str) -> Document:
    schema = {"$ref": f"#/components/schemas/{WebhookPayload.__name__}", "properties": {"type": {"const": name}}}
    headers = [
        {"name": header, "in": "header", "required": True, "description": text, "schema": {"type": "string"}}
        for header, text in WEBHOOK_HEADERS.items()
    ]
    return {
        "post": {
            "operationId": f"on_{name.replace('.', '_')}",
            "tags": ["jobs"],
            "summary": f"A job with a webhook_url has {name.removeprefix('job.')}",
            "description": "Posted to the job's `webhook_url`, signed as in Standard Webhooks 1.0.0, and repeated "
            "until the answer is 2xx.",
            "security": [],
            "parameters": headers,
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
            "responses": {
                "2XX": {"description": "The event was received"},
                "410": {"description": "Ends the attempts for this event"},
            },
        }
    }


def _shapes_of(handler: HTTPRouteHandler) -> Iterator[type[msgspec.Struct]]:
    """Yield the structs that the handler answers with."""
    specs = cast(Iterable[Any], (handler.responses or {}).values())
    declared = [FieldDefinition.from_annotation(spec.data_container) for spec in specs]
    waiting = [handler.parsed_fn_signature.return_type, *declared]
    while waiting:
        field = waiting.pop()
        if isinstance(field.annotation, type) and issubclass(field.annotation, msgspec.Struct):
            yield field.annotation
        waiting += field.inner_types


def _request_schemas() -> dict[str, Document]:
    """Return the schemas of bodies, and of what they contain.

    Defaults that come from the operator's settings or are random are left out: the struct's own would mislead.
    """
    schemas = _schemas([SubmissionBody])
    decided_here = {
        SubmissionBody: ("seed", *GenerationDefaults.__struct_fields__),
        Dype: Dype.__struct_fields__,
        SkipLayerGuidance: SkipLayerGuidance.__struct_fields__,
    }
    for shape, fields in decided_here.items():
        for field in fields:
            schemas[shape.__name__]["properties"].get(field, {}).pop("default", None)
    return schemas


def _response_schemas(shapes: Iterable[type[msgspec.Struct]]) -> dict[str, Document]:
    """Return the schemas of responses, and of what they contain but requests do not.

    A response holds every field, so each is required unless it may be unset. The texts of a stored request have no
    patterns: webhooks cut them.
    """
    schemas = _schemas([*shapes, *STORED_SHAPES])
    for name in _schemas([SubmissionBody]):
        schemas.pop(name, None)
    for schema in schemas.values():
        fields: Document = schema.get("properties", {})
        given = {name for name, field in fields.items() if "default" in field}
        if fields:
            schema["required"] = [name for name in fields if name in given or name in schema.get("required", ())]
        for name in given:
            del fields[name]["default"]
    for field in schemas[GenerationRequest.__name__]["properties"].values():
        for part in (field, *field.get("anyOf", ())):
            part.pop("pattern", None)
    return schemas


def _schemas(shapes: Iterable[type[msgspec.Struct]]) -> dict[str, Document]:
    _, found = msgspec.json.schema_components(shapes, ref_template="#/components/schemas/{name}")
    return {name: _tidied(schema) for name, schema in found.items()}


def _tidied(part: Any) -> Any:
    """Return msgspec's schema with plain descriptions, and with the type of each enumeration for generated clients."""
    if isinstance(part, list):
        return [_tidied(entry) for entry in cast(list[Any], part)]
    if not isinstance(part, Mapping):
        return part
    schema = {name: _tidied(value) for name, value in cast(Mapping[str, Any], part).items()}
    if isinstance(schema.get("description"), str):
        schema["description"] = inspect.cleandoc(schema["description"])
    if isinstance(schema.get("enum"), list):
        schema["type"] = "string" if isinstance(schema["enum"][0], str) else "integer"
    if schema.get("type") == "object" and not schema.keys() & {"$ref", "properties", "additionalProperties"}:
        schema["additionalProperties"] = True
    if "$ref" in schema:  # beside a type, it describes a stored document
        schema = {name: value for name, value in schema.items() if name not in ("type", "anyOf")}
    return schema


def _without_null(schema: Document) -> Document:
    """Return the schema of a parameter without null, which no query or header can express."""
    alternatives = [one for one in schema.get("oneOf", ()) if one.get("type") != "null"]
    rest = {name: value for name, value in schema.items() if name != "oneOf"}
    return {**alternatives[0], **rest} if len(alternatives) == 1 else schema
