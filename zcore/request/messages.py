"""Error messages for values that do not fit a type: what is allowed, and the nearest valid value.

Takes any value and a type annotated with msgspec's bounds. The wording comes from the type and its `Meta` alone, so a
bound and its message cannot disagree. Shared by requests, settings and the HTTP routes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, EnumType
from itertools import islice
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import msgspec
from msgspec import inspect

from zcore.errors import FieldError, Where, did_you_mean

MAX_LISTED = 10
"""How many unknown names, or wrong parts of one value, are described one by one."""
Path = tuple[str | int, ...]
"""Keys and indexes that lead from a value to one of its parts."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One part of a value that does not fit its type: where it is and what is wrong."""

    path: Path
    detail: str


def mismatches(value: Any, kind: Any) -> list[Mismatch]:
    """Return the parts of `value` that do not fit the type `kind`, at most the first ten; empty if all of it fits."""
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        found = list(islice(_parts_that_mismatch(value, kind), MAX_LISTED))
        return found or [Mismatch((), f"must be {allowed(kind)}{_hint(value, kind)}")]
    return []


def field_errors(value: Any, kind: Any, name: str) -> list[FieldError]:
    """Return the errors of the field `name`, each with the JSON pointer of the part that is wrong."""
    return [FieldError(pointer((name, *found.path)), found.detail) for found in mismatches(value, kind)]


def unknown_names(
    names: Sequence[str], known: Iterable[str], noun: str = "field", where: Where = "body"
) -> list[FieldError]:
    """Return the errors of unknown fields or parameters, each with the known name that it resembles.

    Looking for a resemblance is slow, so the first ten are listed and the others counted.
    """
    listed = [
        FieldError(pointer((name,)), f"is not a known {noun}{did_you_mean(name, known)}", where)
        for name in names[:MAX_LISTED]
    ]
    if len(names) > MAX_LISTED:
        listed.append(FieldError("", f"{len(names) - MAX_LISTED} more {noun}s are not known", where))
    return listed


def allowed(kind: Any) -> str:
    """Return what the type allows, to follow "must be": `a whole number from 1 to 50`.

    A type can state it as `Meta(extra={"allowed": ...})`. A type with a pattern must, unless its description fits.
    """
    choices = _choices(kind)
    if choices:
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    return _described(_essential(kind))


def nearest(value: float, kind: Any) -> float | None:
    """Return the valid number nearest to `value`; None if there is none."""
    info = _without_metadata(_essential(kind))
    if not isinstance(info, inspect.IntType | inspect.FloatType) or isinstance(value, bool) or value != value:
        return None
    low, high = info.ge, info.le
    if low is not None and value <= low:
        found: float = low
    elif high is not None and value >= high:
        found = high
    elif value in (math.inf, -math.inf):
        return None
    elif isinstance(info, inspect.IntType):
        step = info.multiple_of or 1
        below = int(value // step) * step
        found = below if value - below < below + step - value else below + step
    else:
        found = value
    is_open = (info.gt is not None and found <= info.gt) or (info.lt is not None and found >= info.lt)
    return None if is_open else found


def pointer(path: Path) -> str:
    """Return a path as a JSON pointer (RFC 6901, section 3)."""
    return "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in path)


def _parts_that_mismatch(value: Any, kind: Any) -> Iterator[Mismatch]:
    whole, kind = kind, _bare(kind)
    arguments = get_args(kind)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and isinstance(value, Mapping):
        yield from _fields_that_mismatch(cast(Mapping[str, Any], value), kind)
    elif get_origin(kind) in (tuple, list) and isinstance(value, list | tuple):
        items = cast(list[Any], value)
        has_fixed_length = get_origin(kind) is tuple and arguments[-1] is not Ellipsis
        kinds = arguments if has_fixed_length else (arguments[0],) * len(items)
        if len(items) == len(kinds) and not _is_too_long(items, whole):
            for index, (item, item_kind) in enumerate(zip(items, kinds, strict=True)):
                yield from _below(index, mismatches(item, item_kind))
    elif get_origin(kind) is dict and isinstance(value, Mapping):
        for key, item in cast(Mapping[Any, Any], value).items():
            yield from _below(str(key), mismatches(key, arguments[0]) or mismatches(item, arguments[1]))


def _fields_that_mismatch(value: Mapping[str, Any], kind: type[msgspec.Struct]) -> Iterator[Mismatch]:
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    for name in value:
        if name not in fields:
            yield Mismatch((name,), f"is not a known field{did_you_mean(name, fields)}")
    for name, field in fields.items():
        if name in value:
            yield from _below(name, mismatches(value[name], field.type))
        elif field.required:
            yield Mismatch((name,), "is required")


def _is_too_long(value: Sequence[Any], kind: Any) -> bool:
    """Return whether a list has more items than its type allows, so that looking at each would be wasted."""
    info = _without_metadata(_essential(kind))
    at_most = info.max_length if isinstance(info, inspect.VarTupleType | inspect.ListType) else None
    return at_most is not None and len(value) > at_most


def _below(key: str | int, found: Iterable[Mismatch]) -> Iterator[Mismatch]:
    return (Mismatch((key, *one.path), one.detail) for one in found)


def _bare(kind: Any) -> Any:
    """Return the type without its `Meta` and without None."""
    while True:
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        elif get_origin(kind) in (Union, UnionType):
            kind = next(one for one in get_args(kind) if one is not NoneType)
        else:
            return kind


def _choices(kind: Any) -> list[str]:
    """Return the members of a Literal or an enumeration, in order; empty for other types."""
    kind = _bare(kind)
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    return [str(member.value) for member in cast(type[Enum], kind)] if isinstance(kind, EnumType) else []


def _essential(kind: Any) -> inspect.Type:
    """Return the type as msgspec describes it, without None: a caller who wants None leaves the field out."""
    info = inspect.type_info(kind)
    if isinstance(info, inspect.UnionType):
        return next(one for one in info.types if not isinstance(one, inspect.NoneType))
    return info


def _without_metadata(info: inspect.Type) -> inspect.Type:
    return info.type if isinstance(info, inspect.Metadata) else info


def _described(info: inspect.Type) -> str:
    match info:
        case inspect.Metadata(extra={"allowed": str(text)}):
            return text
        case inspect.Metadata(type=inspect.StrType(pattern=str()), extra_json_schema={"description": str(text)}):
            return text
        case inspect.Metadata():
            return _described(info.type)
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType():
            return f"a whole number{_range(info)}"
        case inspect.FloatType():
            return f"a number{_range(info)}"
        case inspect.StrType(min_length=low, max_length=high):
            return f"text{_count(low, high, 'character')}"
        case (
            inspect.VarTupleType(item_type=item, min_length=low, max_length=high)
            | inspect.ListType(item_type=item, min_length=low, max_length=high)
        ):
            return f"a list{_count(low, high, _noun(item)) or f' of {_noun(item)}s'}"
        case _:
            return "an object"


def _range(info: inspect.IntType | inspect.FloatType) -> str:
    if info.ge is not None and info.le is not None:
        bounds = f" from {_figure(info.ge)} to {_figure(info.le)}"
    else:
        parts = [
            f"{words} {_figure(bound)}"
            for words, bound in (
                ("above", info.gt), ("of at least", info.ge), ("below", info.lt), ("at most", info.le),
            )
            if bound is not None
        ]  # fmt: skip
        bounds = f" {' and '.join(parts)}" if parts else ""
    return bounds + (f" that is a multiple of {info.multiple_of}" if info.multiple_of else "")


def _count(low: int | None, high: int | None, noun: str) -> str:
    if low and high:
        return f" of {low} to {high} {noun}s"
    if low or high:
        return f" of at {'least' if low else 'most'} {low or high} {noun}{'s' if (low or high) != 1 else ''}"
    return ""


def _noun(info: inspect.Type) -> str:
    match _without_metadata(info):
        case inspect.StrType():
            return "text"
        case inspect.IntType():
            return "whole number"
        case inspect.FloatType():
            return "number"
        case inspect.StructType():
            return "object"
        case _:
            return "value"


def _hint(value: Any, kind: Any) -> str:
    """Return a suggestion of the nearest valid value, to append to what is allowed; empty if there is none."""
    if isinstance(value, str):
        return did_you_mean(value, _choices(kind))
    number = nearest(value, kind) if isinstance(value, int | float) else None
    return "" if number is None else f"; the nearest is {_figure(number)}"


def _figure(number: float) -> str:
    return str(number).removesuffix(".0")
