"""What the API says of itself beyond the job: shapes of answers, and the request's schema and examples for OpenAPI."""

from datetime import datetime
from typing import Any, cast

import msgspec
from litestar.openapi.spec import Example

from zcore.jobs.resource import JobResource
from zcore.request import Delivery, GenerationDefaults, GenerationRequest


class JobPage(msgspec.Struct, frozen=True):
    """A stretch of the job list, newest first. `next` is the address of the following one, None at the end."""

    jobs: list[JobResource]
    next_cursor: str | None
    next: str | None


class RegisteredLora(msgspec.Struct, frozen=True):
    """A LoRA that requests may name. `sha256` is of its file, in hexadecimal."""

    name: str
    sha256: str
    licence: str
    bytes: int
    created_at: datetime


class LoraList(msgspec.Struct, frozen=True):
    """All of them, by name."""

    loras: list[RegisteredLora]


class UploadedInput(msgspec.Struct, frozen=True):
    """An uploaded picture. `id` is what `image` and `mask` of a submission take until `expires_at`.

    Width and height are pixels of the upright picture, `bytes` those of the file.
    """

    id: str
    width: int
    height: int
    format: str
    bytes: int
    expires_at: datetime


class Health(msgspec.Struct, frozen=True):
    """`status` is `ok` or `unavailable`; `workers` counts GPU workers seen in the last 20 seconds."""

    status: str
    database: bool
    workers: int


class Problem(msgspec.Struct, frozen=True):
    """RFC 9457. `code` is stable; `errors` names each wrong field by JSON pointer."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    errors: list[dict[str, str]] = []


class TemplateEntry(msgspec.Struct, frozen=True):
    """A template by name."""

    name: str
    category: str
    description: str


class TemplateList(msgspec.Struct, frozen=True):
    """Templates, sorted by category and name."""

    templates: list[TemplateEntry]


class TemplateText(msgspec.Struct, frozen=True):
    """A whole template; its fields are named as those of a request that take their place."""

    name: str
    category: str
    description: str
    system_prompt: str
    thinking_content: str
    assistant_content: str
    force_think_block: bool


class FormattedPromptAnswer(msgspec.Struct, frozen=True):
    """A prompt in its layout. `kept_tokens` is what `long_prompt_mode` leaves of `tokens` for the transformer; null
    where a submission would be refused.
    """

    formatted: str
    tokens: int | None
    limit: int | None
    kept_tokens: int | None
    long_prompt_mode: str


class NamedSize(msgspec.Struct, frozen=True):
    """A size with what it may be called; pixels."""

    name: str
    ratio: str
    width: int
    height: int


class SizePair(msgspec.Struct, frozen=True):
    """Pixels."""

    width: int
    height: int


class SidesBounds(msgspec.Struct, frozen=True):
    """What is refused: sides outside the bounds or no multiple, and more pixels than the operator paints."""

    smallest_side_px: int
    largest_side_px: int
    multiple_px: int
    max_pixels: int


class SizeList(msgspec.Struct, frozen=True):
    """Sizes by name at the operator's usual resolution, and the bounds of any."""

    presets: list[NamedSize]
    ratios: list[NamedSize]
    resolutions: list[int]
    default: SizePair
    limits: SidesBounds


def submission_schema() -> dict[str, Any]:
    """Fields and bounds of `POST /api/generate`, read off the structs that check them."""
    schema = prompt_schema(GenerationRequest, Delivery)
    # Decided by the operator's settings, or at random: the struct's own defaults would mislead.
    for name in {"seed", *GenerationDefaults.__struct_fields__} & schema["properties"].keys():
        schema["properties"][name].pop("default", None)
    return {**schema, "title": "Submission"}


def prompt_schema(*shapes: type[msgspec.Struct]) -> dict[str, Any]:
    """Fields and bounds of a body that these structs make together; what they hold stands inside them."""
    properties: dict[str, Any] = {}
    for shape in shapes:
        definitions = msgspec.json.schema(shape)["$defs"]
        properties |= _inlined(definitions[shape.__name__]["properties"], definitions)
    del properties["version"]
    return {"properties": properties, "required": ["prompt"]}


def _inlined(part: Any, definitions: dict[str, Any]) -> Any:
    """The same schema without references, which in OpenAPI would lead nowhere."""
    if isinstance(part, list):
        return [_inlined(entry, definitions) for entry in cast(list[Any], part)]
    if not isinstance(part, dict):
        return part
    entries = cast(dict[str, Any], part)
    if "$ref" in entries:
        return _inlined(definitions[entries["$ref"].rpartition("/")[2]], definitions)
    return {name: _inlined(value, definitions) for name, value in entries.items()}


SUBMISSION_EXAMPLES = [
    Example(summary="The least", value={"prompt": "a red circle on a blue background"}),
    Example(
        summary="Everything",
        value={
            "prompt": "a sunset over the sea",
            "template": "photography",
            "width": 1024,
            "height": 768,
            "steps": 8,
            "seed": 42,
            "n": 2,
            "webhook_url": "https://example.com/hooks/pictures",
            "metadata": {"order": "A-1001"},
            "priority": 5,
        },
    ),
]
