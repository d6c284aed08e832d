"""Response shapes of the API other than the job, and example submissions. `openapi` derives the document from them."""

from typing import Any, Literal, cast

import msgspec
from msgspec import UNSET, UnsetType

from zcore.errors import Where
from zcore.jobs.resource import JobResource, Time
from zcore.request import Delivery, GenerationRequest, LongPromptMode, SentSeed, SizeChoice


class JobPage(msgspec.Struct, frozen=True):
    """One page of the job list, newest first. `next` is the URL of the next page, null on the last one."""

    jobs: list[JobResource]
    next_cursor: str | None
    next: str | None


class RegisteredLora(msgspec.Struct, frozen=True):
    """A LoRA that requests may use. `sha256` is the hexadecimal digest of its file.

    Unless `strict`, what does not fit the model is left out of it, and each of its jobs lists that.
    """

    name: str
    sha256: str
    licence: str
    bytes: int
    created_at: Time
    strict: bool


class LoraList(msgspec.Struct, frozen=True):
    """All registered LoRAs, sorted by name."""

    loras: list[RegisteredLora]


class UploadedInput(msgspec.Struct, frozen=True):
    """An uploaded image. `image` and `mask` of a submission accept `id` until `expires_at`.

    `width` and `height` are in pixels, after applying the EXIF orientation; `bytes` is the file size.
    """

    id: str
    width: int
    height: int
    format: str
    bytes: int
    expires_at: Time


class Liveness(msgspec.Struct, frozen=True):
    """The process responds."""

    status: Literal["ok"] = "ok"


class Health(msgspec.Struct, frozen=True):
    """Readiness. `workers` counts the workers seen in the last 20 seconds.

    `status` is `draining` while the process is being stopped.
    """

    status: Literal["ok", "draining", "unavailable"]
    database: bool
    workers: int


class FieldProblem(msgspec.Struct, frozen=True):
    """One wrong part of a request.

    In the body, `pointer` is its JSON pointer (RFC 6901), which is empty for the whole; elsewhere it has a `name`.
    """

    where: Where = msgspec.field(name="in")
    detail: str
    pointer: str | UnsetType = UNSET
    name: str | UnsetType = UNSET


class Problem(msgspec.Struct, frozen=True):
    """An error in the form of RFC 9457. `code` is stable; `request_id` finds the request in the server's log.

    `instance` is the path; it is absent if the request could not be read.
    """

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    instance: str | UnsetType = UNSET
    errors: list[FieldProblem] | UnsetType = UNSET


class TemplateEntry(msgspec.Struct, frozen=True):
    """A template in the list."""

    name: str
    category: str
    description: str


class TemplateList(msgspec.Struct, frozen=True):
    """Prompt templates, sorted by category and name."""

    templates: list[TemplateEntry]


class TemplateText(msgspec.Struct, frozen=True):
    """A complete template. Request fields of the same names override its fields."""

    name: str
    category: str
    description: str
    system_prompt: str
    thinking_content: str
    assistant_content: str
    force_think_block: bool


class FormattedPromptAnswer(msgspec.Struct, frozen=True):
    """A formatted prompt.

    `used_tokens` is how many of `tokens` reach the transformer under `long_prompt_mode`; null if a submission would be
    refused.
    """

    formatted: str
    tokens: int | None
    limit: int | None
    used_tokens: int | None
    long_prompt_mode: LongPromptMode


class NamedSize(msgspec.Struct, frozen=True):
    """A size in pixels, with its name and aspect ratio."""

    name: str
    ratio: str
    width: int
    height: int


class SizePair(msgspec.Struct, frozen=True):
    """A size in pixels."""

    width: int
    height: int


class SidesBounds(msgspec.Struct, frozen=True):
    """Limits of a size: the bounds and the multiple of each side, and the operator's limit on the number of pixels."""

    smallest_side_px: int
    largest_side_px: int
    multiple_px: int
    max_pixels: int


class SizeList(msgspec.Struct, frozen=True):
    """Named sizes at the default resolution, and the limits of any size."""

    presets: list[NamedSize]
    ratios: list[NamedSize]
    resolutions: list[int]
    default: SizePair
    limits: SidesBounds


def _body(name: str, *parts: type[msgspec.Struct]) -> type[msgspec.Struct]:
    """Return a struct with the fields of all these structs, and no others. A later part replaces an earlier field."""
    fields: dict[str, tuple[str, type, Any]] = {
        field.name: (
            field.name,
            field.type,
            cast(Any, msgspec.field)(default=field.default, default_factory=field.default_factory),
        )
        for part in parts
        for field in msgspec.structs.fields(part)
    }
    return msgspec.defstruct(name, list(fields.values()), kw_only=True, forbid_unknown_fields=True)


SubmissionBody = _body("Submission", GenerationRequest, SentSeed, SizeChoice, Delivery)
"""Every field that `parse_submission` accepts, for the OpenAPI document."""

SUBMISSION_EXAMPLES: dict[str, dict[str, Any]] = {
    "minimal": {"prompt": "a red circle on a blue background"},
    "common_options": {
        "prompt": "a sunset over the sea",
        "template": "photography",
        "width": 512,
        "height": 384,
        "steps": 8,
        "seed": 42,
        "n": 2,
        "format": "webp",
        "quality": 80,
        "webhook_url": "https://example.com/hooks/images",
        "metadata": {"order": "A-1001"},
        "priority": 5,
    },
    "named_size": {"prompt": "a lighthouse at dusk", "aspect_ratio": "16:9", "resolution": 448},
    "inpainting": {
        "prompt": "a hat of straw",
        "image": "https://example.com/portrait.png",
        "mask": "https://example.com/hat.png",
        "strength": 0.9,
    },
    "guided_in_two_passes": {
        "prompt": "a harbour in the morning",
        "negative_prompt": "people",
        "guidance_scale": 3.5,
        "slg": {"scale": 2.0, "layers": [2, 3]},
        "passes": [{"scale": 0.5}, {"scale": 1.0, "strength": 0.5}],
        "dype": {"method": "yarn", "base_resolution": 1024},
    },
}
"""Bodies that `POST /api/generate` accepts, by name."""
