"""The OpenAPI document in tests: made from settings, and compared with real responses and bodies."""

import re
from typing import Any

import httpx
import jsonschema_rs
import msgspec
from litestar.testing import TestClient

from server.app import create_app
from zcore.settings import Settings

METHODS = ("get", "post", "put", "patch", "delete")
PREFIX = "#/components/schemas/"
# Objects whose other fields depend on what the job used.
OPEN_OBJECTS = {"JobEngine"}


def document_of(settings: Settings) -> dict[str, Any]:
    """Return the OpenAPI document of a server with these settings."""
    with TestClient(create_app(settings)) as client:  # which closes everything that the server has opened
        document: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(client.app.openapi_schema.to_schema()))
    return document


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Return method, path and description of each operation."""
    return [
        (method, path, item[method]) for path, item in document["paths"].items() for method in METHODS if method in item
    ]


class Description:
    """A document that says what is wrong with a value or a response.

    Stricter than the document itself: an object may have no field that the document does not name.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        closed = {
            name: {"additionalProperties": False, **schema}
            if "properties" in schema and name not in OPEN_OBJECTS
            else schema
            for name, schema in document["components"]["schemas"].items()
        }
        self._definitions = {"components": {"schemas": closed}}
        self._paths = {
            re.compile(re.sub(r"\\\{\w+\\\}", ".+" if "{key}" in path else "[^/]+", re.escape(path))): item
            for path, item in document["paths"].items()
        }
        self._validators: dict[str, jsonschema_rs.Draft202012Validator] = {}

    def errors(self, schema: dict[str, Any], value: Any) -> list[str]:
        """Return what the schema refuses in a value."""
        key = str(schema)
        if key not in self._validators:
            self._validators[key] = jsonschema_rs.Draft202012Validator(
                {**schema, **self._definitions}, validate_formats=True
            )
        return [f"{list(error.instance_path)}: {error.message}" for error in self._validators[key].iter_errors(value)]

    def named(self, name: str) -> dict[str, Any]:
        """Return a reference to a component."""
        return {"$ref": f"{PREFIX}{name}"}

    def undeclared(self, response: httpx.Response) -> list[str]:
        """Return in what a response differs from the document. Routes outside the document are not compared."""
        method, path = response.request.method.lower(), response.request.url.path
        items = [item for pattern, item in self._paths.items() if pattern.fullmatch(path)]
        operation = next((item[method] for item in items if method in item), None)
        if operation is None or (response.status_code == 404 and not _is_routed(operation, path)):
            return []
        if str(response.status_code) not in operation["responses"]:
            return [f"status {response.status_code} of {method} {path} is not declared"]
        declared = operation["responses"][str(response.status_code)]
        missing = [
            f"header {name} of {method} {path} is missing"
            for name, header in declared.get("headers", {}).items()
            if header.get("required") and name not in response.headers
        ]
        content = declared.get("content", {})
        media_type = response.headers.get("content-type", "").partition(";")[0]
        if not content:
            return missing
        if media_type not in content and f"{media_type.partition('/')[0]}/*" not in content:
            return [*missing, f"content type {media_type!r} of {method} {path} is not declared"]
        if not media_type.endswith("json"):
            return missing
        return missing + self.errors(content[media_type]["schema"], response.json())


def _is_routed(operation: dict[str, Any], path: str) -> bool:
    """Return whether the path has the form of the operation's parameters; the router answers 404 to any other."""
    is_uuid = re.search("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", path)
    formats = [one["schema"].get("format") for one in operation.get("parameters", ()) if one["in"] == "path"]
    return "uuid" not in formats or is_uuid is not None
