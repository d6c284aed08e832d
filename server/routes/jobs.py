"""Submit, follow, list and cancel jobs, and fetch their images."""

import re
import uuid
from typing import Annotated, Any
from urllib.parse import urlencode

from litestar import Response, get, post
from litestar.datastructures import ResponseHeader
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, FromQuery, HeaderParameter, JSONBody, QueryParameter
from litestar.response import Redirect

from server import media_types
from server.callers import callers_only
from server.dependencies import (
    NamedCaller,
    NamedDatabase,
    NamedDefaults,
    NamedSettings,
    NamedStorage,
    NamedSubmissions,
    NamedThreads,
)
from server.parameters import parse_time
from server.problems import refusal
from server.schemas import JobPage
from server.submission import fingerprint_of
from zcore.api_paths import JOBS_PATH, cancel_path, job_path
from zcore.errors import Gone, InvalidRequest
from zcore.jobs import lifecycle, queries
from zcore.jobs.queries import JobFilter
from zcore.jobs.resource import JobResource, describe
from zcore.jobs.states import TERMINAL, State
from zcore.request import UNWRITABLE, parse_submission
from zcore.storage_keys import output_name

MAX_WAIT_S = 60
RETRY_AFTER_S = 1
CURSOR_PATTERN = "^[A-Za-z0-9_-]{22}$"
IDEMPOTENCY_KEY_PATTERN = '[^"\\s]'


RETRY_AFTER_HEADER = ResponseHeader(
    name="Retry-After",
    value="",
    description="Seconds to wait before polling; absent once the job has ended",
    documentation_only=True,
)


def _time(description: str) -> QueryParameter:
    """Declare a time. The handler parses it, because the framework would also accept a number of seconds."""
    return QueryParameter(max_length=40, description=description, schema_extra={"format": "date-time"})


@post(
    "/api/generate",
    guards=[callers_only, media_types.only("application/json")],
    status_code=202,
    tags=["jobs"],
    summary="Submit an image generation",
    operation_class=media_types.SubmissionOperation,
    response_description="The job is stored",
    response_headers=[
        ResponseHeader(name="Location", value="", description="The job's path", required=True, documentation_only=True),
        RETRY_AFTER_HEADER,
        ResponseHeader(
            name="Preference-Applied",
            value="",
            description="The preference that was followed, as `wait=N`",
            documentation_only=True,
        ),
        ResponseHeader(
            name="Idempotency-Replayed",
            value="",
            description="`true` if an earlier request with the same key created the job",
            documentation_only=True,
        ),
    ],
    responses={
        200: ResponseSpec(JobResource, description="The job ended within `Prefer: wait`, or earlier"),
        422: refusal("The Idempotency-Key was used with another body"),
    },
)
async def submit_job(
    data: JSONBody[dict[str, Any]],
    caller: NamedCaller,
    settings: NamedSettings,
    defaults: NamedDefaults,
    submissions: NamedSubmissions,
    threads: NamedThreads,
    prefer: Annotated[
        str | None,
        HeaderParameter(name="prefer", description="`wait=N`: wait up to N seconds for the job to end, at most 60"),
    ] = None,
    idempotency_key: Annotated[
        str | None,
        HeaderParameter(
            name="idempotency-key",
            min_length=1,
            max_length=255,
            description="The same key and body within 24 hours return the same job",
            schema_extra={"pattern": IDEMPOTENCY_KEY_PATTERN},
        ),
    ] = None,
) -> Response[JobResource]:
    """Answers 202 with the job as soon as it is stored; it runs when a worker is free.

    With `Prefer: wait=N` the answer is held until the job ends (200) or N seconds have passed (202). Neither the end
    of the wait nor a lost connection cancels the job.
    """
    submission = await threads.local.run(parse_submission, data, defaults, settings.limits)
    fingerprint = await threads.local.run(fingerprint_of, data)
    accepted = await submissions.submit(submission, caller, fingerprint, _unquoted(idempotency_key))
    wait_s = _requested_wait_s(prefer)
    job = accepted.job if wait_s is None else await submissions.wait(accepted.job, caller, wait_s)
    headers = {"location": job_path(job.id), **_retry_after(job)}
    if wait_s is not None:
        headers["preference-applied"] = f"wait={wait_s}"
    if accepted.replayed:
        headers["idempotency-replayed"] = "true"
    return Response(job, status_code=200 if job.status in TERMINAL else 202, headers=headers)


@get(
    JOBS_PATH,
    tags=["jobs"],
    summary="List jobs, newest first",
    sync_to_thread=True,
)
def list_jobs(
    caller: NamedCaller,
    settings: NamedSettings,
    database: NamedDatabase,
    storage: NamedStorage,
    status: FromQuery[State | None] = None,
    text: Annotated[
        str | None,
        QueryParameter(
            max_length=200,
            description="Words of the prompt or metadata, key=value of the metadata, or the beginning of a job id",
            schema_extra={"pattern": r"^[^\x00]*$(?!\n)"},
        ),
    ] = None,
    created_from: Annotated[str | None, _time("The earliest creation time, inclusive")] = None,
    created_before: Annotated[str | None, _time("The latest creation time, exclusive")] = None,
    cursor: Annotated[
        str | None,
        QueryParameter(
            max_length=100,
            description="`next_cursor` of the previous page",
            schema_extra={"pattern": CURSOR_PATTERN},
        ),
    ] = None,
    limit: Annotated[int, QueryParameter(ge=1, le=200)] = 50,
) -> JobPage:
    """Lists the caller's own jobs. Follow `next` until it is null; a page costs the same at any depth."""
    if text is not None and UNWRITABLE.search(text):
        raise InvalidRequest.field("text", "must not contain NUL characters or unpaired surrogates", "query")
    from_at, before_at = parse_time("created_from", created_from), parse_time("created_before", created_before)
    job_filter = JobFilter(caller.name, status, text, from_at, before_at)
    with database.read() as transaction:
        page = queries.page(transaction, job_filter, cursor, limit)
        positions = queries.queue_positions(transaction, page.jobs)
        jobs = [describe(job, settings.public_url, storage.link, positions.get(job.id)) for job in page.jobs]
    next_parameters = {
        "status": status,
        "text": text,
        "created_from": created_from,
        "created_before": created_before,
        "limit": limit,
        "cursor": page.next_cursor,
    }
    query = urlencode({name: value for name, value in next_parameters.items() if value is not None})
    return JobPage(jobs, page.next_cursor, f"{settings.public_url}{JOBS_PATH}?{query}" if page.next_cursor else None)


@get(
    job_path("{job_id:uuid}"),
    tags=["jobs"],
    summary="Get a job",
    response_headers=[RETRY_AFTER_HEADER],
    sync_to_thread=True,
)
def get_job(job_id: FromPath[uuid.UUID], caller: NamedCaller, submissions: NamedSubmissions) -> Response[JobResource]:
    """Returns the job's state, progress and images, with fresh links."""
    job = submissions.look_up(job_id, caller)
    return Response(job, headers=_retry_after(job))


@post(
    cancel_path("{job_id:uuid}"),
    status_code=200,
    tags=["jobs"],
    summary="Cancel a job",
    sync_to_thread=True,
)
def cancel_job(
    job_id: FromPath[uuid.UUID], caller: NamedCaller, database: NamedDatabase, submissions: NamedSubmissions
) -> JobResource:
    """Cancels a queued job immediately, a running one at its next step. A job that has ended does not change."""
    with database.write() as transaction:
        queries.get(transaction, job_id, caller.name)
        lifecycle.cancel(transaction, job_id)
    return submissions.look_up(job_id, caller)


@get(
    job_path("{job_id:uuid}") + "/outputs/{position:int}",
    tags=["jobs"],
    summary="Get an image of a job",
    status_code=302,
    responses={
        404: refusal("There is no such job or image"),
        410: refusal("The image was deleted after its retention time"),
    },
    sync_to_thread=True,
)
def get_output(
    job_id: FromPath[uuid.UUID],
    position: FromPath[int],
    caller: NamedCaller,
    database: NamedDatabase,
    storage: NamedStorage,
) -> Redirect:
    """Redirects to a fresh link to the image; use `curl --location`."""
    with database.read() as transaction:
        job, output = queries.output(transaction, job_id, position, caller.name)
    if job.status == State.EXPIRED:
        raise Gone(f"the images of job {job_id} were deleted after their retention time")
    name = output_name(job_id, position, output.format)
    return Redirect(storage.link(output.key, name).url, status_code=302)


def _retry_after(job: JobResource) -> dict[str, str]:
    return {} if job.status in TERMINAL else {"retry-after": str(RETRY_AFTER_S)}


def _unquoted(idempotency_key: str | None) -> str | None:
    """Return the key without quotes: the IETF draft requires them, but bare keys are accepted too."""
    if idempotency_key is None:
        return None
    unquoted = idempotency_key.strip().strip('"').strip()
    if not unquoted:
        raise InvalidRequest.field("Idempotency-Key", "must not be empty", "header")
    return unquoted


def _requested_wait_s(prefer: str | None) -> int | None:
    """Return the seconds of `wait=N` among the comma-separated preferences of RFC 7240, or None."""
    found = re.search(r"(?:^|[,;])\s*wait\s*=\s*(\d{1,9})", prefer or "", re.IGNORECASE)
    return None if found is None else min(int(found[1]), MAX_WAIT_S)
