"""The job as callers see it: the JSON of the API and of webhooks, from one row.

Takes a `Job` row and a function that turns an output's key into a fresh link; gives `JobResource`. Callers never build
URLs: every link stands in the object. Does not know how links are signed.
"""

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Protocol

import msgspec

from zcore.jobs.models import Job, Output
from zcore.jobs.states import TERMINAL, State


class Progress(msgspec.Struct, frozen=True):
    """How far a running job is. `fraction` runs from 0 to 1 over all pictures of the job."""

    phase: str
    step: int
    steps: int
    fraction: float


class JobError(msgspec.Struct, frozen=True):
    """Why a job failed. `code` is stable; `retryable` says whether the same request may succeed later."""

    code: str
    message: str
    retryable: bool


class OutputResource(msgspec.Struct, frozen=True):
    """One stored picture. `url` works without a key until `expires_at`."""

    index: int
    url: str | None
    expires_at: datetime | None
    width: int
    height: int
    format: str
    bytes: int
    sha256: str
    seed: int


class JobUrls(msgspec.Struct, frozen=True):
    """Where to look and act next."""

    self: str
    cancel: str


class JobResource(msgspec.Struct, frozen=True, kw_only=True):
    """A job with everything a caller may know. Times are UTC. `stage` is what is done next, or now; None at the end."""

    id: str
    status: str
    stage: str | None = None
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    expires_at: datetime | None
    cancel_requested_at: datetime | None
    queue_position: int | None
    attempt: int
    progress: Progress | None
    outputs: list[OutputResource]
    error: JobError | None
    metrics: dict[str, Any]
    engine: dict[str, Any]
    request: dict[str, Any]
    metadata: dict[str, Any]
    urls: JobUrls | None


class Link(Protocol):
    """A link to an object that works without a key until it expires, as `zcore.storage` makes them."""

    @property
    def url(self) -> str: ...
    @property
    def expires_at(self) -> datetime: ...


def describe(job: Job, public_url: str, link: Callable[[str], Link], queue_position: int | None = None) -> JobResource:
    """The job of this row, with links of now. `queue_position` counts from 1 and belongs to queued jobs."""
    resource = msgspec.structs.replace(snapshot(job), queue_position=queue_position)
    keys = {} if job.status == State.EXPIRED else {output.position: output.key for output in job.outputs}
    return linked(resource, keys, public_url, link)


def snapshot(job: Job) -> JobResource:
    """The job of this row without links, to be kept as it stood."""
    return JobResource(
        id=str(job.id),
        status=job.status,
        stage=None if job.status in TERMINAL else job.stage,
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
        request=job.request,
        metadata=job.caller_metadata,
        urls=None,
    )


def linked(resource: JobResource, keys: Mapping[int, str], public_url: str, link: Callable[[str], Link]) -> JobResource:
    """The same job with fresh links; an output whose index is not in `keys` was purged and gets none."""
    links = {index: link(key) for index, key in keys.items()}
    outputs = [
        msgspec.structs.replace(output, url=links[output.index].url, expires_at=links[output.index].expires_at)
        if output.index in links
        else output
        for output in resource.outputs
    ]
    address = f"{public_url}/api/jobs/{resource.id}"
    return msgspec.structs.replace(resource, outputs=outputs, urls=JobUrls(self=address, cancel=f"{address}/cancel"))


def _progress(job: Job) -> Progress | None:
    if job.progress_phase is None:
        return None
    fraction = job.progress_step / job.progress_steps if job.progress_steps else 0.0
    return Progress(job.progress_phase, job.progress_step, job.progress_steps, round(fraction, 4))


def _output(output: Output) -> OutputResource:
    return OutputResource(
        index=output.position,
        url=None,
        expires_at=None,
        width=output.width,
        height=output.height,
        format=output.format,
        bytes=output.bytes,
        sha256=output.sha256,
        seed=output.seed,
    )
