"""What the API says of itself beyond the job: shapes of answers, and the request's schema and examples for OpenAPI."""

from datetime import datetime
from typing import Any

import msgspec
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example

from server.problems import MEDIA_TYPE
from zcore.jobs.resource import JobResource
from zcore.request import Delivery, GenerationRequest


class JobPage(msgspec.Struct, frozen=True):
    """A stretch of the job list, newest first. `next` is the address of the following one, None at the end."""

    jobs: list[JobResource]
    next_cursor: str | None
    next: str | None


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


def refusal(description: str) -> ResponseSpec:
    """A problem, as OpenAPI lists it among a route's answers."""
    return ResponseSpec(Problem, description=description, media_type=MEDIA_TYPE)


def submission_schema() -> dict[str, Any]:
    """Fields and bounds of `POST /api/generate`, read off the structs that check them."""
    properties: dict[str, Any] = {}
    for shape in (GenerationRequest, Delivery):
        properties |= msgspec.json.schema(shape)["$defs"][shape.__name__]["properties"]
    del properties["version"]
    # Decided by the operator's settings, or at random: the struct's own defaults would mislead.
    for name in ("width", "height", "steps", "shift", "seed"):
        properties[name].pop("default", None)
    return {"properties": properties, "required": ["prompt"], "title": "Submission"}


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
