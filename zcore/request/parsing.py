"""Parsing of untyped input into a validated request in which every field has a value.

Takes a JSON body or keyword arguments, and the operator's defaults and limits; returns a `Submission` or a
`GenerationRequest`. One `InvalidRequest` lists every field that is wrong.
"""

import math
import re
import secrets
from collections.abc import Iterator, Mapping
from typing import Any, cast

import msgspec

from zcore.errors import FieldError, InvalidRequest
from zcore.request.fields import (
    CHOSEN_SEED_BOUND,
    SEED_BOUND,
    SIZE_FIELDS,
    UNWRITABLE,
    Delivery,
    GenerationDefaults,
    GenerationRequest,
    RequestLimits,
    Resolution,
    Side,
    Submission,
)
from zcore.request.messages import field_errors, nearest, pointer, unknown_names
from zcore.request.rules import LOCAL_INPUTS, REMOTE_INPUTS, InputKinds, delivery_errors, request_errors
from zcore.sizes import Size, named_size

_DECIMAL = re.compile(r"[0-9]{1,19}")
_GIVEN_BACK = ("metadata",)
"""Fields that belong to the caller, and are stored and returned as they came."""
_DEEPEST_FIELD = 4
"""Levels of objects and lists below a field that can hold a number of ours, as in `passes[0].slg.layers`."""


def parse_submission(body: Mapping[str, Any], defaults: GenerationDefaults, limits: RequestLimits) -> Submission:
    """Parse the whole body of a submission. Raises `InvalidRequest` listing every field that is wrong.

    Instead of `width` and `height` the body may hold `size` or `aspect_ratio` (see `zcore.sizes`), with the area of
    the operator's default size or of `resolution`. Inputs are addresses that any worker can fetch: https URLs, uploads,
    and outputs of jobs.
    """
    return _parse(body, defaults, limits, REMOTE_INPUTS)


def parse_generation(
    fields: Mapping[str, Any], defaults: GenerationDefaults | None = None, limits: RequestLimits | None = None
) -> GenerationRequest:
    """Parse the generation fields alone, for callers in this process; their inputs are addressed as `given:NAME`.

    Raises `InvalidRequest` listing every field that is wrong.
    """
    unwanted = [
        FieldError(f"/{name}", "applies only to a submitted job, not to a generation in this process")
        for name in fields
        if name in Delivery.__struct_fields__
    ]
    if unwanted:
        raise InvalidRequest(unwanted)
    return _parse(fields, defaults or GenerationDefaults(), limits or RequestLimits(), LOCAL_INPUTS).request


def _parse(
    body: Mapping[str, Any], defaults: GenerationDefaults, limits: RequestLimits, inputs: InputKinds
) -> Submission:
    errors: list[FieldError] = []
    others = {name: value for name, value in body.items() if name not in SIZE_FIELDS}
    size = _requested_size({name: body[name] for name in SIZE_FIELDS if name in body}, others, defaults, errors)
    size_source = _size_source(body, is_valid=not errors)
    request_fields = {name: value for name, value in others.items() if name not in Delivery.__struct_fields__}
    delivery_fields = {name: value for name, value in others.items() if name in Delivery.__struct_fields__}
    decided = {
        **_request_defaults(defaults),
        "seed": secrets.randbelow(CHOSEN_SEED_BOUND),
        **({"width": size.width, "height": size.height} if size else {}),
        **_with_completed_objects(request_fields, defaults),
    }
    if isinstance(seed := decided["seed"], str) and _DECIMAL.fullmatch(seed):
        decided["seed"] = int(seed)
    request = _valid_fields(decided, GenerationRequest, errors)
    delivery = _valid_fields(delivery_fields, Delivery, errors)
    errors += [*request_errors(request, limits, inputs, size_source), *delivery_errors(delivery)]
    if errors:
        raise InvalidRequest(errors)
    return Submission(GenerationRequest(**request), Delivery(**delivery))


def _request_defaults(defaults: GenerationDefaults) -> dict[str, Any]:
    known = GenerationRequest.__struct_fields__
    return {name: value for name, value in msgspec.to_builtins(defaults).items() if name in known}


def _with_completed_objects(fields: Mapping[str, Any], defaults: GenerationDefaults) -> dict[str, Any]:
    """Complete partial `slg` and `dype` objects from the defaults; those of a pass from the request's, if any."""
    base: dict[str, Any] = {
        "slg": msgspec.to_builtins(defaults.slg_fields),
        "dype": msgspec.to_builtins(defaults.dype_fields),
    }

    def complete(partial: Mapping[str, Any]) -> dict[str, Any]:
        objects = {name: {**base[name], **partial[name]} for name in base if isinstance(partial.get(name), Mapping)}
        return {**partial, **objects}

    request = complete(fields)
    base |= {name: request[name] for name in base if isinstance(request.get(name), Mapping)}
    if isinstance(request.get("passes"), list | tuple):
        request["passes"] = [
            complete(cast(Mapping[str, Any], one)) if isinstance(one, Mapping) else one for one in request["passes"]
        ]
    return request


def _valid_fields(fields: Mapping[str, Any], shape: type[msgspec.Struct], errors: list[FieldError]) -> dict[str, Any]:
    """Convert each field on its own and return the valid ones; faults of the others are appended to `errors`."""
    known = {field.name: field for field in msgspec.structs.fields(shape)}
    errors += unknown_names([name for name in fields if name not in known], _names_of_fields())
    values: dict[str, Any] = {}
    for name, field in known.items():
        if name not in fields:
            if field.required:
                errors.append(FieldError(pointer((name,)), "is required"))
            continue
        given = fields[name] if name in _GIVEN_BACK else _with_whole_numbers(fields[name])
        try:
            value = msgspec.convert(given, field.type)
        except msgspec.ValidationError:
            errors += field_errors(given, field.type, name)
            continue
        if any(UNWRITABLE.search(text) for text in _texts(value)):
            errors.append(FieldError(pointer((name,)), "must not contain NUL characters or unpaired surrogates"))
            continue
        values[name] = value
    return values


def _requested_size(
    requested: Mapping[str, Any], others: Mapping[str, Any], defaults: GenerationDefaults, errors: list[FieldError]
) -> Size | None:
    """Return the size that `size`, `aspect_ratio` and `resolution` request; None if they request none."""
    if not requested:
        return None
    sides = [name for name in ("width", "height") if name in others]
    if sides:
        errors += [
            FieldError(f"/{name}", f"cannot be combined with {' and '.join(sides)}; give only one of them")
            for name in requested
        ]
        return None
    if "size" in requested and len(requested) > 1:
        errors.append(FieldError("/size", "cannot be combined with aspect_ratio or resolution; give only one of them"))
        return None
    resolution = _with_whole_numbers(requested.get("resolution", round(math.sqrt(defaults.width * defaults.height))))
    if faults := field_errors(resolution, Resolution, "resolution"):
        errors += faults
        return None
    name = "size" if "size" in requested else "aspect_ratio"
    wanted = requested.get(name, "1:1")
    if wanted == "auto":
        if "resolution" in requested:
            errors.append(FieldError("/resolution", f"has no effect if {name} is auto; give a ratio such as 16:9"))
        return None
    if name == "aspect_ratio" and not (isinstance(wanted, str) and ":" in wanted):
        errors.append(FieldError("/aspect_ratio", "must be a ratio such as 16:9, or auto"))
        return None
    try:
        size = named_size(wanted if isinstance(wanted, str) else "", resolution)
    except ValueError as fault:
        errors.append(FieldError(f"/{name}", str(fault)))
        return None
    valid = Size(int(nearest(size.width, Side) or 0), int(nearest(size.height, Side) or 0))
    if size != valid:
        bounds = "must have sides from 64 to 8192 px that are multiples of 16"
        errors.append(FieldError(f"/{name}", f"{bounds}; the nearest is {valid.width}x{valid.height}"))
        return None
    return size


def _size_source(body: Mapping[str, Any], is_valid: bool) -> list[str]:
    """Return the fields of the body that determine the area; width and height if the defaults do."""
    if sides := [name for name in ("width", "height") if name in body]:
        return sides
    named = [name for name in ("resolution", "aspect_ratio", "size") if name in body][:1]
    return (named or ["width", "height"]) if is_valid else []


def _with_whole_numbers(value: Any, levels: int = _DEEPEST_FIELD) -> Any:
    """Return the value with integers in place of whole numbers that are written as decimals, such as 8.0 and 1e3.

    JSON has one type of number, and JSON Schema counts 8.0 among the integers (2020-12, section 4.2.3). A field that
    is not an integer accepts one too.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < SEED_BOUND:
        return int(value)
    if levels and isinstance(value, dict):
        return {key: _with_whole_numbers(item, levels - 1) for key, item in cast(dict[Any, Any], value).items()}
    if levels and isinstance(value, list | tuple):
        return [_with_whole_numbers(item, levels - 1) for item in cast(list[Any], value)]
    return value


def _texts(document: Any) -> Iterator[str]:
    """Yield every text in a JSON document, keys included."""
    waiting: list[Any] = [document]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            waiting += [*cast(dict[Any, Any], part), *cast(dict[Any, Any], part).values()]
        elif isinstance(part, list):
            waiting += cast(list[Any], part)


def _names_of_fields() -> tuple[str, ...]:
    return (*GenerationRequest.__struct_fields__, *SIZE_FIELDS, *Delivery.__struct_fields__)
