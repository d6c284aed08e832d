"""What a caller may ask for: one frozen, validated value that HTTP accepts, the job stores and the pipeline takes.

Takes untyped input (a JSON body, CLI arguments) and the operator's defaults and limits; gives a `GenerationRequest`
with every value decided, the seed included. Every bound of a request stands here, once. Does not know HTTP, the
database, the tokenizer (lengths in tokens are checked where one is at hand) or the model.
"""

import difflib
import re
import secrets
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, cast
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from zcore.errors import FieldError, InvalidRequest

SEED_BOUND = 2**63
CHOSEN_SEED_BOUND = 2**53  # what every JSON reader keeps exactly
SIZE_MULTIPLE_PX = 16
PROMPT_LIMIT_CHARACTERS = 16_384
METADATA_LIMIT_BYTES = 1024

# What neither PostgreSQL nor UTF-8 can hold.
UNWRITABLE = re.compile("[\0\ud800-\udfff]")

Side = Annotated[
    int,
    Meta(ge=64, le=8192, multiple_of=SIZE_MULTIPLE_PX, description="Pixels; a multiple of 16 from 64 to 8192."),
]
Steps = Annotated[int, Meta(ge=1, le=50, description="Transformer forwards; 8 is what the model was distilled for.")]
Shift = Annotated[float, Meta(ge=0.1, le=20.0, description="Flow-matching schedule shift.")]


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=False):
    """One picture (or `n` of them) as asked for, with everything that decides its pixels.

    Built by `parse_submission` or `parse_generation`.
    """

    version: Literal[1] = 1
    prompt: Annotated[str, Meta(min_length=1, max_length=PROMPT_LIMIT_CHARACTERS, description="What to paint.")]
    template: Annotated[str, Meta(min_length=1, max_length=100)] | None = None
    width: Side = 1024
    height: Side = 1024
    steps: Steps = 8
    shift: Shift = 3.0
    seed: Annotated[
        int,
        Meta(ge=0, le=SEED_BOUND - 1, description="0 to 2^63-1; chosen at random, stored and returned when absent."),
    ] = 0
    n: Annotated[int, Meta(ge=1, le=8, description="Pictures of this request; picture i uses seed + i.")] = 1

    def seed_of(self, index: int) -> int:
        """The seed of picture `index` (from 0) of this request; wraps at 2^63."""
        return (self.seed + index) % SEED_BOUND


class Delivery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the caller wants around the picture: who is told, what is remembered, how soon."""

    webhook_url: (
        Annotated[str, Meta(max_length=2048, description="Told by a signed POST when the job has ended.")] | None
    ) = None
    metadata: Annotated[dict[str, Any], Meta(description="The caller's own; at most 1 KiB as JSON.")] = {}
    priority: Annotated[int, Meta(ge=-10, le=10, description="Higher is claimed first.")] = 0


class Submission(msgspec.Struct, frozen=True):
    """What one `POST /api/generate` asks for."""

    request: GenerationRequest
    delivery: Delivery


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator's settings fill in where the caller is silent."""

    width: Side = 1024
    height: Side = 1024
    steps: Steps = 8
    shift: Shift = 3.0


class RequestLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator's hardware allows, below the model's own bounds.

    `max_pixels` counts one picture's width times height.
    """

    max_pixels: Annotated[int, Meta(ge=64 * 64)] = 4096 * 4096


def parse_submission(body: Mapping[str, Any], defaults: GenerationDefaults, limits: RequestLimits) -> Submission:
    """The whole body of a submission. Raises `InvalidRequest` naming every field that is wrong."""
    request_fields = {name: value for name, value in body.items() if name not in Delivery.__struct_fields__}
    delivery_fields = {name: value for name, value in body.items() if name in Delivery.__struct_fields__}
    decided = {**msgspec.to_builtins(defaults), "seed": secrets.randbelow(CHOSEN_SEED_BOUND), **request_fields}
    errors: list[FieldError] = []
    request = _valid_fields(decided, GenerationRequest, errors)
    delivery = _valid_fields(delivery_fields, Delivery, errors)
    errors += [*_request_faults(request, limits), *_delivery_faults(delivery)]
    if errors:
        raise InvalidRequest(errors)
    return Submission(GenerationRequest(**request), Delivery(**delivery))


def parse_generation(
    fields: Mapping[str, Any], defaults: GenerationDefaults | None = None, limits: RequestLimits | None = None
) -> GenerationRequest:
    """The picture's part alone, for callers in this process.

    Raises `InvalidRequest` naming every field that is wrong.
    """
    unwanted = [
        FieldError(f"/{name}", "belongs to a submitted job, not to a picture")
        for name in fields
        if name in Delivery.__struct_fields__
    ]
    if unwanted:
        raise InvalidRequest(unwanted)
    return parse_submission(fields, defaults or GenerationDefaults(), limits or RequestLimits()).request


def said_plainly(message: str) -> str:
    """msgspec's sentence without its path, which stands beside it in another form."""
    sentence = message.split(" - at ")[0]
    return sentence[:1].lower() + sentence[1:]


def _valid_fields(fields: Mapping[str, Any], shape: type[msgspec.Struct], errors: list[FieldError]) -> dict[str, Any]:
    """Each field by itself, so that one answer names every fault: those that are right; the others go to `errors`."""
    known = {field.name: field for field in msgspec.structs.fields(shape)}
    errors += [FieldError(_pointer(name), _unknown_field(name)) for name in fields if name not in known]
    values: dict[str, Any] = {}
    for name, field in known.items():
        if name not in fields:
            if field.required:
                errors.append(FieldError(_pointer(name), "is required"))
            continue
        try:
            value = msgspec.convert(fields[name], field.type)
        except msgspec.ValidationError as fault:
            errors.append(FieldError(_pointer(name), said_plainly(str(fault))))
            continue
        if any(UNWRITABLE.search(text) for text in _texts(value)):
            errors.append(FieldError(_pointer(name), "holds a NUL or half a surrogate pair, which cannot be stored"))
            continue
        values[name] = value
    return values


def _request_faults(valid: Mapping[str, Any], limits: RequestLimits) -> list[FieldError]:
    """What no single field can know, as far as the fields it needs are right by themselves."""
    faults: list[FieldError] = []
    width, height = valid.get("width", 0), valid.get("height", 0)
    pixels = width * height
    if pixels > limits.max_pixels:
        detail = f"{width}x{height} is {pixels} pixels; at most {limits.max_pixels} are painted here"
        faults += [FieldError("/width", detail), FieldError("/height", detail)]
    if "prompt" in valid and not valid["prompt"].strip():
        faults.append(FieldError("/prompt", "must not be blank"))
    return faults


def _delivery_faults(valid: Mapping[str, Any]) -> list[FieldError]:
    faults: list[FieldError] = []
    webhook_url = valid.get("webhook_url")
    if webhook_url is not None and not _is_plain_web_address(webhook_url):
        faults.append(FieldError("/webhook_url", "must be an absolute http or https URL without user and password"))
    size = len(msgspec.json.encode(valid.get("metadata")))
    if size > METADATA_LIMIT_BYTES:
        faults.append(FieldError("/metadata", f"is {size} bytes as JSON; at most {METADATA_LIMIT_BYTES}"))
    return faults


def _texts(document: Any) -> Iterator[str]:
    """Every text in a JSON document, keys included."""
    waiting: list[Any] = [document]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            waiting += [*cast(dict[Any, Any], part), *cast(dict[Any, Any], part).values()]
        elif isinstance(part, list):
            waiting += cast(list[Any], part)


def _pointer(name: str) -> str:
    """RFC 6901, section 3."""
    return "/" + name.replace("~", "~0").replace("/", "~1")


def _is_plain_web_address(url: str) -> bool:
    if " " in url or not url.isprintable():
        return False  # urlsplit would drop some of these without a word
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None and port != 0


def _unknown_field(name: str) -> str:
    near = difflib.get_close_matches(name, (*GenerationRequest.__struct_fields__, *Delivery.__struct_fields__), n=1)
    return f"is not a field of a request; did you mean `{near[0]}`?" if near else "is not a field of a request"
