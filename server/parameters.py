"""Parameters of a route outside its body, and a guard that is strict about those in the query.

A misspelled parameter that is ignored answers another question than the one asked: `?state=failed` would list jobs of
every state. Pages are exempt, because other sites append parameters of their own to links.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler, HTTPRouteHandler
from litestar.params import HeaderParameter, ParameterKwarg, PathParameter, QueryParameter

from zcore.errors import FieldError, InvalidRequest, Where
from zcore.request import unknown_names

PLACES: Mapping[type[ParameterKwarg], Where] = {
    QueryParameter: "query",
    HeaderParameter: "header",
    PathParameter: "path",
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter as callers know it. `is_list`: it may be repeated. `is_text`: any word may be its value."""

    name: str
    where: Where
    is_list: bool
    is_text: bool
    is_required: bool


@cache
def parameters_of(handler: BaseRouteHandler) -> Mapping[str, Parameter]:
    """Return the handler's parameters by the names of its arguments."""
    found: dict[str, Parameter] = {}
    for argument, field in handler.parsed_fn_signature.parameters.items():
        declared = field.kwarg_definition
        if isinstance(declared, ParameterKwarg) and (where := PLACES.get(type(declared))):
            found[argument] = Parameter(
                declared.name or argument,
                where,
                field.is_non_string_sequence,
                str in (field.annotation, *(inner.annotation for inner in field.inner_types)),
                field.is_required,
            )
    return found


def strict_query(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """Guard of every documented route: refuse query parameters that are unknown, repeated, missing or `null`.

    msgspec reads the word `null` as no value, so that `?status=null` would list jobs of every state.
    Raises `InvalidRequest` naming each of them, with the known parameter that an unknown one resembles.
    """
    if not (isinstance(handler, HTTPRouteHandler) and handler.resolve_include_in_schema()):
        return
    known = {one.name: one for one in parameters_of(handler).values() if one.where == "query"}
    given = Counter(name for name, _ in connection.query_params.multi_items())
    unknown = unknown_names([name for name in given if name not in known], known, "parameter", "query")
    repeated = [
        FieldError(f"/{name}", "must be given only once", "query")
        for name, times in given.items()
        if name in known and times > 1 and not known[name].is_list
    ]
    missing = [
        FieldError(f"/{name}", "is required", "query")
        for name, parameter in known.items()
        if parameter.is_required and name not in given
    ]
    nulls = [
        FieldError(f"/{name}", "must not be null; leave the parameter out", "query")
        for name, value in connection.query_params.multi_items()
        if name in known and value.lower() == "null" and not (known[name].is_text or known[name].is_required)
    ]
    if errors := [*unknown, *repeated, *missing, *nulls]:
        raise InvalidRequest(errors)


def parse_time(name: str, text: str | None) -> datetime | None:
    """Return an ISO 8601 time, in UTC if it has no zone; None for None.

    Raises `InvalidRequest` on anything else, such as a number of seconds.
    """
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        detail = "must be an ISO 8601 date and time, such as 2030-01-31T18:00:00Z"
        raise InvalidRequest.field(name, detail, "query") from error
