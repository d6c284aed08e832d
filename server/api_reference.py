"""An OpenAPI document as the sections of a page for people.

Takes the document as a dictionary; returns its operations by tag, with parameters, body fields and answers. Follows
references within the document. Does not depend on HTTP or HTML.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

METHODS = ("get", "post", "put", "patch", "delete")


@dataclass(frozen=True, slots=True)
class Field:
    """A parameter, or a field of a body."""

    name: str
    place: str
    type: str
    is_required: bool
    description: str


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path. `answers` are pairs of a status and its meaning."""

    id: str
    method: str
    path: str
    summary: str
    description: str
    fields: list[Field]
    answers: list[tuple[str, str]]


def sections(document: Mapping[str, Any]) -> dict[str, list[Operation]]:
    """Return the operations of the document by their first tag, in the order of the document."""
    found: dict[str, list[Operation]] = {}
    for path, item in document["paths"].items():
        for method in METHODS:
            if method in item:
                tag = (item[method].get("tags") or ["other"])[0]
                found.setdefault(tag, []).append(_operation(document, method, path, item[method]))
    return found


def _operation(document: Mapping[str, Any], method: str, path: str, described: Mapping[str, Any]) -> Operation:
    return Operation(
        id=described.get("operationId", f"{method}-{path}"),
        method=method.upper(),
        path=path,
        summary=described.get("summary", ""),
        description=described.get("description", ""),
        fields=[*_parameters(document, described), *_body_fields(document, described)],
        answers=[
            (str(status), _resolved(document, one).get("description", ""))
            for status, one in described.get("responses", {}).items()
        ],
    )


def _parameters(document: Mapping[str, Any], described: Mapping[str, Any]) -> Iterator[Field]:
    for reference in described.get("parameters", []):
        one = _resolved(document, reference)
        schema = one.get("schema", {})
        description = one.get("description") or _description(document, schema)
        yield Field(one["name"], one["in"], _type(document, schema), one.get("required", False), description)


def _body_fields(document: Mapping[str, Any], described: Mapping[str, Any]) -> Iterator[Field]:
    body = _resolved(document, described.get("requestBody", {}))
    for media_type, content in body.get("content", {}).items():
        schema = _resolved(document, content.get("schema", {}))
        properties = schema.get("properties")
        if not properties:
            yield Field("body", media_type, _type(document, schema), True, schema.get("description", ""))
            continue
        for name, part in properties.items():
            is_required = name in schema.get("required", [])
            yield Field(name, "body", _type(document, part), is_required, _description(document, part))


def _description(document: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """Return a schema's description; without one, the first among the schemas that it consists of."""
    own = str(schema.get("description") or _resolved(document, schema).get("description", ""))
    parts = [part for several in ("oneOf", "anyOf") for part in schema.get(several, [])]
    return own or next((found for part in parts if (found := _description(document, part))), "")


def _type(document: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """Return a schema's type in a few words, with its bounds."""
    if "$ref" in schema:
        resolved = _resolved(document, schema)
        return _type(document, resolved) if "enum" in resolved else str(schema["$ref"]).rpartition("/")[2]
    if "enum" in schema:
        return " | ".join(str(one) for one in schema["enum"] if one is not None)
    for several in ("oneOf", "anyOf"):
        if several in schema:
            kinds = [_type(document, one) for one in schema[several] if one.get("type") != "null"]
            return " | ".join(dict.fromkeys(kinds))
    kind = schema.get("type", "any")
    name = kind if isinstance(kind, str) else " | ".join(one for one in kind if one != "null")
    if "items" in schema:
        name = f"{name} of {_type(document, schema['items'])}"
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    bounds = f" {'' if low is None else low} to {'' if high is None else high}" if (low, high) != (None, None) else ""
    return f"{name}{bounds}"


def _resolved(document: Mapping[str, Any], part: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a part refers to, if it is a reference such as `#/components/schemas/Name`."""
    while "$ref" in part:
        target: Any = document
        for key in str(part["$ref"]).removeprefix("#/").split("/"):
            target = target[key]
        part = target
    return part
