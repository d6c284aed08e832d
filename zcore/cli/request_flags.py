"""Command-line flags for the fields of a `GenerationRequest`.

The name, bounds and help of each flag come from the field, so a new field gets its flag automatically. The parser
checks types and choices; `parse_generation` checks bounds.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import Meta

from zcore.errors import InvalidRequest
from zcore.request import INPUT_FIELDS, PASS_PRESETS, SIZE_FIELDS, GenerationDefaults, GenerationRequest
from zcore.sizes import PRESETS, RATIOS

TEXT_FIELDS = (
    "prompt",
    "negative_prompt",
    "template",
    "system_prompt",
    "thinking_content",
    "assistant_content",
    "force_think_block",
    "strip_quotes",
    "clean_whitespace",
    "hidden_layer",
    "layer_weights",
    "long_prompt_mode",
)
"""Fields that determine the embedding of a prompt."""

GROUPS: dict[str, tuple[str, ...]] = {
    "prompt": TEXT_FIELDS,
    "size": ("width", "height", *SIZE_FIELDS),
    "generation": ("seed", "n", "steps", "shift", "guidance_scale", "cfg_normalization", "cfg_truncation", "passes"),
    "starting from an image": ("image", "mask", "strength", "strength_rule", "fit", "keep_unmasked"),
    "file format": ("format", "quality"),
}
"""Groups of flags in `--help`. A field that is in no group is listed under `more`."""

FLAG_NAMES = {"prompt": "PROMPT", "image": "--img2img"}
"""Flags whose name differs from that of their field."""

SETTING_PREFIXES = {"tiled_vae": "pytorch.tiled_vae", "slg": "slg.", "dype": "dype."}
"""Fields that are set through the flags of settings with these prefixes, since settings are the request's defaults."""

WITHOUT_FLAG = ("version", "loras")
"""`loras` names LoRAs in the library of a service; the command line has `--lora FILE:SCALE` instead."""

_OWN_HELP = {
    "prompt": "What the image should show; `-` reads it from standard input.",
    "image": "Image to start from. Without a size, the result has the size of this image, rounded down to multiples "
    "of 16.",
    "mask": "Image that is white where --img2img is to be changed; the rest is preserved.",
    "template": "Style by name; `zimage templates` lists them.",
    "width": "Width in pixels.",
    "height": "Height in pixels.",
    "seed": "The same seed gives the same image; random if omitted.",
    "n": "Number of images; each uses the next seed.",
    "passes": f"Several passes, each refining the one before: {', '.join(PASS_PRESETS)}, or JSON such as "
    '[{"scale": 0.5}, {"scale": 1.0, "strength": 0.5}].',
    "format": "Format of the file; by default the suffix of --output selects it.",
    "size": f"WIDTHxHEIGHT, a ratio such as 16:9, or one of {', '.join(PRESETS)}.",
    "aspect_ratio": f"One of {', '.join(RATIOS)}, or any other ratio W:H.",
    "resolution": "For --aspect-ratio: the side, in pixels, of the square with the same area.",
}


def request_fields() -> tuple[str, ...]:
    """Return all fields that have a flag, in the order of the request."""
    excluded = (*WITHOUT_FLAG, *SETTING_PREFIXES)
    return (*(name for name in GenerationRequest.__struct_fields__ if name not in excluded), *SIZE_FIELDS)


def flag_of(field: str) -> str:
    """Return the flag of a request field."""
    return FLAG_NAMES.get(field, f"--{field.replace('_', '-')}")


def describe_errors(error: InvalidRequest) -> str:
    """Return the error's message in terms of flags instead of request fields."""
    known = (*request_fields(), "embeddings")

    def flag_at(pointer: str) -> str:
        name, separator, rest = pointer.removeprefix("/").partition("/")
        return f"{flag_of(name) if name in known else name}{separator}{rest}"

    return "; ".join(f"{flag_at(one.pointer)}: {one.detail}" for one in error.errors)


def add_request_flags(parser: argparse.ArgumentParser, fields: Iterable[str], prompt_required: bool) -> None:
    """Add a flag for each of these fields, sorted into groups."""
    wanted = list(fields)
    grouped = {name for names in GROUPS.values() for name in names}
    groups = {**GROUPS, "more": tuple(name for name in wanted if name not in grouped)}
    for title, names in groups.items():
        chosen = [name for name in names if name in wanted]
        if chosen:
            group = parser.add_argument_group(title)
            for name in chosen:
                _add(group, name, prompt_required)


def given_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields given on the command line, untyped like a JSON body."""
    known = request_fields()
    return {name: value for name, value in vars(arguments).items() if name in known}


def fields_set_by_settings(arguments: argparse.Namespace) -> set[str]:
    """Return the fields that the command line sets by the flag of a setting."""
    return {
        field for field, prefix in SETTING_PREFIXES.items() if any(name.startswith(prefix) for name in vars(arguments))
    }


@dataclass(frozen=True, slots=True)
class _Kind:
    """Unwrapped type of a field, and its metadata."""

    type: Any
    meta: Sequence[Meta]

    @property
    def description(self) -> str:
        return next((one.description for one in reversed(self.meta) if one.description), "")

    @property
    def bounds(self) -> str:
        """Bounds of a number in words; empty for other types and for open ranges."""
        if self.type not in (int, float):
            return ""
        low = next((f"{one.ge:g}" for one in self.meta if one.ge is not None), None)
        above = next((f"above {one.gt:g}" for one in self.meta if one.gt is not None), None)
        high = next((one.le for one in self.meta if one.le is not None), None)
        multiple = next((f", a multiple of {one.multiple_of}" for one in self.meta if one.multiple_of), "")
        return "" if high is None or high > 1e9 else f"{low or above} to {high:g}{multiple}"


def _kind(hint: Any) -> _Kind:
    if get_origin(hint) in (Union, UnionType):
        return _kind(next(one for one in get_args(hint) if one is not type(None)))
    if get_origin(hint) is Annotated:
        inner = _kind(hint.__origin__)
        return _Kind(inner.type, [*inner.meta, *(one for one in hint.__metadata__ if isinstance(one, Meta))])
    return _Kind(hint, [])


def _add(group: Any, name: str, prompt_required: bool) -> None:
    options: dict[str, Any] = {"help": _help(name).replace("%", "%%"), "default": argparse.SUPPRESS}
    if name == "prompt":
        optional = {} if prompt_required else {"nargs": "?"}
        group.add_argument(name, metavar=FLAG_NAMES[name], type=_prompt, **options, **optional)
        return
    kind = _hints().get(name)
    group.add_argument(flag_of(name), dest=name, **options, **_value_options(name, kind))


def _value_options(name: str, kind: _Kind | None) -> dict[str, Any]:
    """Return the argparse options that parse the flag's value."""
    if name in INPUT_FIELDS:
        return {"metavar": "FILE"}
    if name == "resolution":
        return {"metavar": "PX", "type": _number(int)}
    if kind is None or kind.type is str:
        return {"metavar": "NAME" if name == "template" else "TEXT"}
    if kind.type is bool:
        return {"action": argparse.BooleanOptionalAction}
    if kind.type in (int, float):
        return {"metavar": "N" if kind.type is int else "X", "type": _number(kind.type)}
    if get_origin(kind.type) is Literal:
        return {"choices": get_args(kind.type)}
    return {"metavar": "JSON", "type": _passes if name == "passes" else _json}


def _help(name: str) -> str:
    """Return the description of the field with its bounds and default."""
    kind = _hints().get(name)
    if kind is None:
        return _OWN_HELP[name]
    notes = [kind.bounds, _default(name)]
    suffix = "; ".join(note for note in notes if note)
    return (_OWN_HELP.get(name) or _with_flags(kind.description)) + (f" ({suffix})" if suffix else "")


def _with_flags(text: str) -> str:
    """Replace the names of fields by their flags."""
    names = "|".join(name for name in request_fields() if "_" in name)
    return re.sub(rf"\b({names})\b", lambda found: flag_of(found[0]), text)


def _default(name: str) -> str:
    if name in GenerationDefaults.__struct_fields__:
        return "default from the settings"
    default = next(field.default for field in msgspec.structs.fields(GenerationRequest) if field.name == name)
    if default is True:
        return "on by default"
    plain = isinstance(default, int | float | str) and not isinstance(default, bool)
    return f"default {default}" if plain and default != "" and name not in ("seed", "format") else ""


def _hints() -> dict[str, _Kind]:
    return {field.name: _kind(field.type) for field in msgspec.structs.fields(GenerationRequest)}


def _prompt(text: str) -> str:
    """Return the prompt, read from standard input for `-`."""
    if text != "-":
        return text
    try:
        return sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError("standard input is not valid UTF-8") from None


def _number(kind: type[int] | type[float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            return kind(text)
        except ValueError:
            described = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {described}, not `{text}`") from None

    return read


def _json(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise argparse.ArgumentTypeError(f"is not valid JSON: {error}") from None


def _passes(text: str) -> Any:
    return PASS_PRESETS[text] if text in PASS_PRESETS else _json(text)
