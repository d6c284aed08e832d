"""The fields of a `GenerationRequest` as flags.

Takes names of fields; adds a flag for each to a parser, with the name, bounds and meaning that the request itself
gives, and reads back what was said. A field added to the request is a flag by that. Checks kinds (a number, a choice);
bounds are the request's to check.
"""

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import Meta

from zcore.errors import InvalidRequest
from zcore.request import INPUT_FIELDS, SIZE_FIELDS, GenerationDefaults, GenerationRequest
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
"""What an embedding follows from."""

GROUPS: dict[str, tuple[str, ...]] = {
    "prompt": TEXT_FIELDS,
    "size": ("width", "height", *SIZE_FIELDS),
    "painting": ("seed", "n", "steps", "shift", "guidance_scale", "cfg_normalization", "cfg_truncation", "passes"),
    "starting from a picture": ("image", "mask", "strength", "strength_rule", "fit", "keep_unmasked"),
    "format of the file": ("format", "quality"),
}
"""How `--help` sorts them. A field that is named nowhere here comes under `more`."""

SPELLED = {"prompt": "PROMPT", "image": "--img2img"}
"""Where a flag is not the field's own name."""

SAID_AS_SETTINGS = {"tiled_vae": "pytorch.tiled_vae", "slg": "slg.", "dype": "dype."}
"""Fields that have flags as settings, whose names begin so: what those say is the request's default."""

UNSAID = ("version", "loras")
"""Fields without a flag: `loras` are names of a service's library; the command line has `--lora FILE:SCALE`."""

PASS_PRESETS: dict[str, list[dict[str, float]]] = {
    "twopass": [{"scale": 0.5}, {"scale": 1.0, "strength": 0.5}],
    "threepass": [{"scale": 0.25}, {"scale": 0.5, "strength": 0.6}, {"scale": 1.0, "strength": 0.5}],
}

_OWN_HELP = {
    "image": "Picture to start from. Without a size, the new one has this one's, rounded down to multiples of 16.",
    "mask": "Picture that is white where to paint anew; the rest stays as it is in --img2img.",
    "template": "Style by name; `zimage templates` lists them.",
    "width": "Pixels.",
    "height": "Pixels.",
    "seed": "The same seed paints the same picture; at random when absent.",
    "n": "How many pictures; the seed counts up.",
    "passes": f"Several passes, each refining the last: {', '.join(PASS_PRESETS)}, or JSON as "
    '[{"scale": 0.5}, {"scale": 1.0, "strength": 0.5}].',
    "format": "Of the file; else what --output ends in.",
    "size": f"WIDTHxHEIGHT, a ratio as 16:9, or one of {', '.join(PRESETS)}.",
    "aspect_ratio": f"One of {', '.join(RATIOS)}, or any other as W:H.",
    "resolution": "Side in pixels of the square of the same area, for --aspect-ratio.",
}


def request_fields() -> tuple[str, ...]:
    """All fields that flags are made of, in the order of the request."""
    unsaid = (*UNSAID, *SAID_AS_SETTINGS)
    return (*(name for name in GenerationRequest.__struct_fields__ if name not in unsaid), *SIZE_FIELDS)


def flag_of(field: str) -> str:
    """How a field of the request is said on the command line."""
    return SPELLED.get(field, f"--{field.replace('_', '-')}")


def in_flags(fault: InvalidRequest) -> str:
    """What is wrong, by the flags that said it."""
    known = request_fields()

    def spelled(pointer: str) -> str:
        name, separator, rest = pointer.removeprefix("/").partition("/")
        return f"{flag_of(name) if name in (*known, 'embeddings') else name}{separator}{rest}"

    return "; ".join(f"{spelled(error.pointer)}: {error.detail}" for error in fault.errors)


def add_request_flags(parser: argparse.ArgumentParser, fields: Iterable[str], prompt_required: bool) -> None:
    """A flag for each of the fields, sorted into groups."""
    wanted = list(fields)
    sorted_in = {name for names in GROUPS.values() for name in names}
    groups = {**GROUPS, "more": tuple(name for name in wanted if name not in sorted_in)}
    for title, names in groups.items():
        chosen = [name for name in names if name in wanted]
        if chosen:
            group = parser.add_argument_group(title)
            for name in chosen:
                _add(group, name, prompt_required)


def said_fields(said: argparse.Namespace) -> dict[str, Any]:
    """The fields that the command line names, as untyped as a JSON body."""
    known = request_fields()
    return {name: value for name, value in vars(said).items() if name in known}


def fields_said_as_settings(said: argparse.Namespace) -> set[str]:
    """The fields that the command line decides by a flag for a setting."""
    return {field for field, begin in SAID_AS_SETTINGS.items() if any(name.startswith(begin) for name in vars(said))}


@dataclass(frozen=True, slots=True)
class _Kind:
    """A field's type without its wrapping, and what the request says about it."""

    type: Any
    meta: Sequence[Meta]

    @property
    def description(self) -> str:
        return next((one.description for one in reversed(self.meta) if one.description), "")

    @property
    def bounds(self) -> str:
        """In words; empty for a text, whose length nobody counts at a terminal."""
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
        group.add_argument(name, metavar=SPELLED[name], **options, **({} if prompt_required else {"nargs": "?"}))
        return
    kind = _hints().get(name)
    group.add_argument(flag_of(name), dest=name, **options, **_reading(name, kind))


def _reading(name: str, kind: _Kind | None) -> dict[str, Any]:
    """What argparse does with a flag's value."""
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
    """What the request says about the field, its bounds and its default."""
    kind = _hints().get(name)
    if kind is None:
        return _OWN_HELP[name]
    notes = [kind.bounds, _default(name)]
    noted = "; ".join(note for note in notes if note)
    return (_OWN_HELP.get(name) or _by_flags(kind.description)) + (f" ({noted})" if noted else "")


def _by_flags(text: str) -> str:
    """A sentence about fields as one about flags."""
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
    except msgspec.DecodeError as fault:
        raise argparse.ArgumentTypeError(f"is not JSON: {fault}") from None


def _passes(text: str) -> Any:
    return PASS_PRESETS[text] if text in PASS_PRESETS else _json(text)
