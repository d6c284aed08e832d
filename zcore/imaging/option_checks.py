"""Checks of load options: values from Python obey the bounds that the operator's settings obey.

Takes option values by name and their types, which carry msgspec's bounds; raises one `ConfigurationError` that names
every option that is wrong, what is allowed and the nearest valid value.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, cast, get_args, get_type_hints

import torch
from msgspec import Meta

from zcore.choices import DTypeName
from zcore.errors import ConfigurationError
from zcore.imaging.weights.loader import dtype_name
from zcore.request import LoraScale, mismatches

FilePath = Annotated[str, Meta(min_length=1, extra={"allowed": "a path, as a str or a pathlib.Path"})]
FolderPaths = Annotated[tuple[FilePath, ...], Meta(extra={"allowed": "a folder or a list of folders"})]
ScaledFile = Annotated[tuple[FilePath, LoraScale], Meta(extra={"allowed": "a pair of a LoRA file and its scale"})]
ScaledFiles = Annotated[tuple[ScaledFile, ...], Meta(extra={"allowed": "a list of pairs of a LoRA file and its scale"})]

_PLAIN_TYPES: dict[Any, Any] = {
    torch.dtype: DTypeName,
    Path: FilePath,
    tuple[Path, ...]: FolderPaths,
    tuple[tuple[Path, float], ...]: ScaledFiles,
}
"""Types that msgspec does not know, and how their values are checked."""


def option_types(options: type) -> dict[str, Any]:
    """Return the type to check each field of an options class against."""
    return {name: _plain_type(kind) for name, kind in get_type_hints(options, include_extras=True).items()}


def refuse_invalid_model_path(model_path: Any) -> None:
    """Raise `ConfigurationError` for a value that is neither a folder's path nor a hub id."""
    kind = Annotated[str, Meta(min_length=1, extra={"allowed": "a folder's path or a hub id"})]
    refuse_invalid({"model_path": model_path}, {"model_path": kind})


def refuse_invalid(values: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    """Raise `ConfigurationError` naming every value that does not fit its type."""
    faults = [
        f"{'.'.join(map(str, (name, *found.path)))}: {found.detail}"
        for name, value in values.items()
        for found in mismatches(_plain(value), types[name])
    ]
    if faults:
        raise ConfigurationError("; ".join(faults))


def _plain_type(kind: Any) -> Any:
    if isinstance(kind, UnionType):
        one, _none = get_args(kind)
        return _plain_type(one) | None
    if kind in _PLAIN_TYPES:
        return _PLAIN_TYPES[kind]
    if isinstance(kind, type) and kind.__module__ != "builtins":
        return Annotated[kind, Meta(extra={"allowed": f"a {kind.__name__}"})]
    return kind


def _plain(value: Any) -> Any:
    """Return dtypes and paths as text, in lists and tuples too; every other value in a form that msgspec can check."""
    match value:
        case torch.dtype():
            return dtype_name(value)
        case Path():
            return str(value)
        case dict():
            return object()  # msgspec would accept it for a struct, but nothing converts it
        case list() | tuple():
            return tuple(map(_plain, cast(Sequence[Any], value)))
        case _:
            return value
