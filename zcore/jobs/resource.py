"""The job as callers see it: the JSON of the API and of webhooks, made from one row.

Takes a `Job` row and a function that makes a link from a storage key. The resource contains every URL that callers
need, so that they never build one. Does not know how links are signed.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, Protocol, cast

import msgspec
from msgspec import UNSET, Meta, UnsetType

from zcore.api_paths import cancel_path, job_path
from zcore.jobs.models import Job, Output
from zcore.jobs.states import TERMINAL, State
from zcore.request import Dype, GenerationRequest, LoraUse, Pass, SkipLayerGuidance
from zcore.stages import Phase, Stage
from zcore.storage_keys import output_name

Time = Annotated[datetime, Meta(tz=True)]
"""A time with its zone, which is UTC."""


class Progress(msgspec.Struct, frozen=True):
    """Progress of a running job. `fraction` is between 0 and 1 over all images of the job."""

    phase: Phase
    step: int
    steps: int
    fraction: float


class JobError(msgspec.Struct, frozen=True):
    """Why a job failed. `code` is stable; `retryable` is true if the same request may succeed later."""

    code: str
    message: str
    retryable: bool


class OutputResource(msgspec.Struct, frozen=True, kw_only=True):
    """A stored image. The URLs need no API key and work until `expires_at`; all three are None after deletion.

    A browser shows the image at `url`, and saves it as a file when it is sent to `download_url`.
    """

    index: int
    url: str | None
    download_url: str | None = None  # snapshots of older versions lack it
    expires_at: Time | None
    width: int
    height: int
    format: str
    bytes: int
    sha256: str
    seed: int
    seed_text: str = ""


class JobMetrics(msgspec.Struct, frozen=True):
    """Cost of a job, over all its images and stages. A value is absent until it is known; all are absent at first.

    Times are in milliseconds of wall time and add up to `total_ms`. `peak_vram_mb` is 0 without a GPU.
    `prompt_tokens` counts the formatted prompt, `used_tokens` what reached the transformer.
    """

    queue_ms: int | UnsetType = UNSET
    encode_ms: int | UnsetType = UNSET
    denoise_ms: int | UnsetType = UNSET
    decode_ms: int | UnsetType = UNSET
    upload_ms: int | UnsetType = UNSET
    total_ms: int | UnsetType = UNSET
    peak_vram_mb: int | UnsetType = UNSET
    prompt_tokens: int | UnsetType = UNSET
    used_tokens: int | UnsetType = UNSET


class JobEngine(msgspec.Struct, frozen=True):
    """What generated the images: versions, checkpoint and arithmetic. Empty until the job has run.

    Further entries name what applied to this job only, such as `lora:NAME` with the SHA-256 of its file.
    """

    engine: str | UnsetType = UNSET
    model: str | UnsetType = UNSET
    model_revision: str | UnsetType = UNSET
    device: str | UnsetType = UNSET
    transformer_dtype: str | UnsetType = UNSET
    transformer_quantization: str | UnsetType = UNSET
    vae_dtype: str | UnsetType = UNSET
    vae_tiles: str | UnsetType = UNSET
    attention_backend: str | UnsetType = UNSET
    compiled: str | UnsetType = UNSET
    encoder_revision: str | UnsetType = UNSET
    encoder_dtype: str | UnsetType = UNSET
    encoder_quantization: str | UnsetType = UNSET
    encoder_device: str | UnsetType = UNSET
    torch: str | UnsetType = UNSET
    diffusers: str | UnsetType = UNSET
    transformers: str | UnsetType = UNSET


class JobUrls(msgspec.Struct, frozen=True):
    """URLs of the job: `self` to GET it, `cancel` to POST to."""

    self: str
    cancel: str


def _shaped_like(shape: type[msgspec.Struct]) -> Meta:
    """Describe a field by a struct, without checking it: stored rows of other versions must stay readable."""
    return Meta(extra_json_schema={"$ref": f"#/components/schemas/{shape.__name__}"})


class JobResource(msgspec.Struct, frozen=True, kw_only=True):
    """A job with everything its caller may see.

    Times are UTC. `stage` is the stage in progress, or the next one; it is None after the job has ended. `seed_text` is
    `request.seed` as decimal text, for readers whose numbers are exact only up to 2^53.
    """

    id: str
    status: State
    stage: Stage | None = None
    created_at: Time
    started_at: Time | None
    completed_at: Time | None
    expires_at: Time | None
    cancel_requested_at: Time | None
    queue_position: int | None
    attempt: int
    progress: Progress | None
    outputs: list[OutputResource]
    error: JobError | None
    metrics: Annotated[dict[str, Any], _shaped_like(JobMetrics)]
    engine: Annotated[dict[str, Any], _shaped_like(JobEngine)]
    request: Annotated[dict[str, Any], _shaped_like(GenerationRequest)]
    seed_text: str = ""
    metadata: dict[str, Any]
    urls: Annotated[JobUrls | None, _shaped_like(JobUrls)]  # None only in a snapshot, which no caller sees


STORED_SHAPES = (JobMetrics, JobEngine, GenerationRequest)
"""Structs that describe stored documents of a `JobResource`."""


WebhookType = Literal["job.succeeded", "job.failed", "job.canceled"]


class WebhookPayload(msgspec.Struct, frozen=True):
    """Body of a webhook. `data` is the job as it was at its end, with links made when the webhook was sent.

    Long texts of `data.request` are cut; `data.urls.self` returns them in full.
    """

    type: WebhookType
    timestamp: Time
    data: JobResource


_PARTS: Mapping[str, type[msgspec.Struct]] = {
    "slg": SkipLayerGuidance,
    "dype": Dype,
    "passes": Pass,
    "loras": LoraUse,
}


class Link(Protocol):
    """A link to a stored object, as `zcore.storage` makes it; needs no API key until it expires."""

    @property
    def url(self) -> str: ...
    @property
    def download_url(self) -> str: ...
    @property
    def expires_at(self) -> datetime: ...


class MakeLink(Protocol):
    """Makes a link to the object under `key`, which callers save as the file `name`."""

    def __call__(self, key: str, name: str, /) -> Link: ...


def describe(job: Job, public_url: str, link: MakeLink, queue_position: int | None = None) -> JobResource:
    """Return the job of this row with fresh links. `queue_position` counts from 1 and is given for queued jobs."""
    resource = msgspec.structs.replace(snapshot(job), queue_position=queue_position)
    keys = {} if job.status == State.EXPIRED else {output.position: output.key for output in job.outputs}
    return linked(resource, keys, public_url, link)


def snapshot(job: Job) -> JobResource:
    """Return the job of this row without links, to be stored as it is now."""
    return JobResource(
        id=str(job.id),
        status=State(job.status),
        stage=None if job.status in TERMINAL else Stage(job.stage),
        created_at=job.created_at,
        started_at=job.started_at,
        completed_at=job.completed_at,
        expires_at=job.expires_at,
        cancel_requested_at=job.cancel_requested_at,
        queue_position=None,
        attempt=job.attempt,
        progress=_progress(job),
        outputs=[_output(output) for output in job.outputs],
        error=JobError(job.error_code, job.error_message or "", bool(job.error_retryable)) if job.error_code else None,
        metrics=job.metrics,
        engine=job.engine,
        request=_in_declared_order(job.request, GenerationRequest),
        seed_text=str(job.request["seed"]),
        metadata=job.caller_metadata,
        urls=None,
    )


def linked(resource: JobResource, keys: Mapping[int, str], public_url: str, link: MakeLink) -> JobResource:
    """Return the same job with fresh links. An output whose index is not in `keys` was deleted and gets none."""

    def with_link(output: OutputResource) -> OutputResource:
        if output.index not in keys:
            return output
        made = link(keys[output.index], output_name(resource.id, output.index, output.format))
        return msgspec.structs.replace(output, url=made.url, download_url=made.download_url, expires_at=made.expires_at)

    outputs = [with_link(output) for output in resource.outputs]
    urls = JobUrls(self=f"{public_url}{job_path(resource.id)}", cancel=f"{public_url}{cancel_path(resource.id)}")
    return msgspec.structs.replace(resource, outputs=outputs, urls=urls)


def _in_declared_order(fields: Mapping[str, Any], shape: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the same fields in the order of the struct, in nested objects too.

    PostgreSQL returns them in an order of its own. A field that this version does not know comes last.
    """
    declared = [name for name in shape.__struct_fields__ if name in fields]
    ordered = {**{name: fields[name] for name in declared}, **fields}
    return {name: _part_in_order(value, _PARTS[name]) if name in _PARTS else value for name, value in ordered.items()}


def _part_in_order(value: Any, shape: type[msgspec.Struct]) -> Any:
    if isinstance(value, list):
        return [_part_in_order(item, shape) for item in cast(list[Any], value)]
    return _in_declared_order(cast(Mapping[str, Any], value), shape) if isinstance(value, Mapping) else value


def _progress(job: Job) -> Progress | None:
    if job.progress_phase is None:
        return None
    fraction = job.progress_step / job.progress_steps if job.progress_steps else 0.0
    return Progress(cast(Phase, job.progress_phase), job.progress_step, job.progress_steps, round(fraction, 4))


def _output(output: Output) -> OutputResource:
    return OutputResource(
        index=output.position,
        url=None,
        download_url=None,
        expires_at=None,
        width=output.width,
        height=output.height,
        format=output.format,
        bytes=output.bytes,
        sha256=output.sha256,
        seed=output.seed,
        seed_text=str(output.seed),
    )
