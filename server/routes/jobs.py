"""Submit, follow, list and cancel jobs, and fetch their pictures."""

import asyncio
import hashlib
import re
import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any
from urllib.parse import urlencode

import msgspec
from litestar import Response, get, post
from litestar.datastructures import ResponseHeader
from litestar.enums import RequestEncodingType
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import BodyKwarg, FromPath, FromQuery, HeaderParameter, QueryParameter
from litestar.response import Redirect

from server import media_types
from server.auth import callers_only
from server.dependencies import (
    NamedDatabase,
    NamedDoorbell,
    NamedPromptLimit,
    NamedSettings,
    NamedStorage,
    NamedWatch,
    Owner,
)
from server.limits import check_web_addresses
from server.problems import refusal
from server.schemas import SUBMISSION_EXAMPLES, JobPage, submission_schema
from zcore.errors import Gone, InvalidRequest
from zcore.jobs import lifecycle, loras, queries
from zcore.jobs.database import Database
from zcore.jobs.queries import JobFilter
from zcore.jobs.resource import JobResource, describe
from zcore.jobs.states import TERMINAL, State
from zcore.request import UNWRITABLE, Submission, parse_submission
from zcore.settings import Settings
from zcore.stages import Stage
from zcore.storage import Storage

LONGEST_WAIT_S = 60
POLL_AGAIN_S = 1


_problems = {
    400: refusal("A field is outside its bounds; `errors` names each"),
    401: refusal("No API key, or a wrong one"),
    503: refusal("The database does not answer"),
}
_no_such_job = {
    401: _problems[401],
    404: refusal("There is no such job"),
    503: _problems[503],
}


@post(
    "/api/generate",
    guards=[callers_only, media_types.only("application/json")],
    status_code=202,
    tags=["jobs"],
    summary="Submit a picture to be painted",
    response_headers=[
        ResponseHeader(name="location", value="", description="The job's address", documentation_only=True),
        ResponseHeader(
            name="retry-after", value="", description="Seconds until a look is worth it", documentation_only=True
        ),
    ],
    responses={
        **_problems,
        200: ResponseSpec(JobResource, description="The job ended within `Prefer: wait`"),
        413: refusal("The body is larger than 1 MiB"),
        415: refusal("The body is not `application/json`"),
        422: refusal("The Idempotency-Key was used with another body"),
    },
)
async def generate(
    data: Annotated[
        dict[str, Any],
        BodyKwarg(media_type=RequestEncodingType.JSON, examples=SUBMISSION_EXAMPLES, schema_extra=submission_schema()),
    ],
    owner: Owner,
    settings: NamedSettings,
    database: NamedDatabase,
    storage: NamedStorage,
    doorbell: NamedDoorbell,
    prompt_limit: NamedPromptLimit,
    watch: NamedWatch,
    prefer: Annotated[
        str | None,
        HeaderParameter(name="prefer", description="`wait=N`: hold the answer up to N seconds, 60 at most"),
    ] = None,
    idempotency_key: Annotated[
        str | None,
        HeaderParameter(
            name="idempotency-key",
            min_length=1,
            max_length=255,
            description="The same key and body within 24 hours give the same job",
        ),
    ] = None,
) -> Response[JobResource]:
    """Answers 202 with the job as soon as it is stored; it is painted when a worker is free.

    With `Prefer: wait=N` the answer is held until the job ends (200) or N seconds have passed (202). Neither the end
    of the wait nor a lost connection cancels the job.
    """
    submission = parse_submission(data, settings.generation_defaults, settings.limits)
    check_web_addresses(submission, settings.webhooks)
    prompt_limit.check(submission.request)
    accepted = await asyncio.to_thread(
        _accept, database, settings, storage, submission, owner, _fingerprint(data), _bare(idempotency_key)
    )
    doorbell.announce(accepted.stage)
    resource = accepted.resource
    wait_s = _wanted_wait_s(prefer)
    if wait_s is not None and resource.status not in TERMINAL:
        await watch.ended(accepted.job_id, wait_s)
        resource = await asyncio.to_thread(_look_up, database, settings, storage, accepted.job_id, owner)
    ended = resource.status in TERMINAL
    headers = {"location": f"/api/jobs/{resource.id}"}
    if not ended:
        headers["retry-after"] = str(POLL_AGAIN_S)
    if wait_s is not None:
        headers["preference-applied"] = f"wait={wait_s}"
    if accepted.replayed:
        headers["idempotency-replayed"] = "true"
    return Response(resource, status_code=200 if ended else 202, headers=headers)


@get(
    "/api/jobs",
    tags=["jobs"],
    summary="Jobs, newest first",
    responses=_problems,
    sync_to_thread=True,
)
def list_jobs(
    owner: Owner,
    settings: NamedSettings,
    database: NamedDatabase,
    storage: NamedStorage,
    status: FromQuery[State | None] = None,
    text: Annotated[
        str | None, QueryParameter(max_length=200, description="A part of the prompt, or a whole id")
    ] = None,
    created_from: FromQuery[datetime | None] = None,
    created_before: FromQuery[datetime | None] = None,
    cursor: Annotated[
        str | None, QueryParameter(max_length=100, description="`next_cursor` of the page before")
    ] = None,
    limit: Annotated[int, QueryParameter(ge=1, le=200)] = 50,
) -> JobPage:
    """One's own jobs. Follow `next` until it is null; a page costs the same at any depth."""
    if text is not None and UNWRITABLE.search(text):
        raise InvalidRequest.field("text", "holds what no prompt can")
    wanted = JobFilter(owner, status, text, created_from, created_before)
    with database.read() as transaction:
        page = queries.page(transaction, wanted, cursor, limit)
        jobs = [describe(job, settings.public_url, storage.link) for job in page.jobs]
    following = {
        "status": status,
        "text": text,
        "created_from": created_from and created_from.isoformat(),
        "created_before": created_before and created_before.isoformat(),
        "limit": limit,
        "cursor": page.next_cursor,
    }
    query = urlencode({name: value for name, value in following.items() if value is not None})
    return JobPage(jobs, page.next_cursor, f"{settings.public_url}/api/jobs?{query}" if page.next_cursor else None)


@get("/api/jobs/{job_id:uuid}", tags=["jobs"], summary="A job", responses=_no_such_job, sync_to_thread=True)
def get_job(
    job_id: FromPath[uuid.UUID], owner: Owner, settings: NamedSettings, database: NamedDatabase, storage: NamedStorage
) -> Response[JobResource]:
    """The job's state, progress and pictures, with fresh links."""
    resource = _look_up(database, settings, storage, job_id, owner)
    headers = {} if resource.status in TERMINAL else {"retry-after": str(POLL_AGAIN_S)}
    return Response(resource, headers=headers)


@post(
    "/api/jobs/{job_id:uuid}/cancel",
    status_code=200,
    tags=["jobs"],
    summary="Cancel a job",
    responses=_no_such_job,
    sync_to_thread=True,
)
def cancel_job(
    job_id: FromPath[uuid.UUID], owner: Owner, settings: NamedSettings, database: NamedDatabase, storage: NamedStorage
) -> JobResource:
    """A queued job is canceled at once, a running one at its next step; a job that has ended stays as it is."""
    with database.write() as transaction:
        queries.get(transaction, job_id, owner)
        lifecycle.cancel(transaction, job_id)
    return _look_up(database, settings, storage, job_id, owner)


@get(
    "/api/jobs/{job_id:uuid}/outputs/{position:int}",
    tags=["jobs"],
    summary="A picture of a job",
    status_code=302,
    responses={
        **_no_such_job,
        404: refusal("There is no such job or picture"),
        410: refusal("The picture was purged after its retention time"),
    },
    sync_to_thread=True,
)
def get_output(
    job_id: FromPath[uuid.UUID], position: FromPath[int], owner: Owner, database: NamedDatabase, storage: NamedStorage
) -> Redirect:
    """Leads to a fresh link of the picture; use `curl --location`."""
    with database.read() as transaction:
        job, output = queries.output(transaction, job_id, position, owner)
    if job.status == State.EXPIRED:
        raise Gone(f"the pictures of job {job_id} were deleted after their retention time")
    return Redirect(storage.link(output.key).url, status_code=302)


@dataclass(frozen=True, slots=True)
class _Accepted:
    job_id: uuid.UUID
    stage: Stage
    resource: JobResource
    replayed: bool


def _accept(
    database: Database,
    settings: Settings,
    storage: Storage,
    submission: Submission,
    owner: str,
    fingerprint: str,
    idempotency_key: str | None,
) -> _Accepted:
    with database.write() as transaction:
        submitted = lifecycle.submit(
            transaction,
            submission,
            owner,
            fingerprint,
            settings.jobs.max_attempts,
            idempotency_key,
            settings.jobs.first_stage,
        )
        if not (submitted.replayed or settings.lora.folder):  # what a folder holds only its worker knows
            loras.check(transaction, submission.request)
        position = queries.queue_position(transaction, submitted.job)
        resource = describe(submitted.job, settings.public_url, storage.link, position)
    return _Accepted(submitted.job.id, Stage(submitted.job.stage), resource, submitted.replayed)


def _look_up(database: Database, settings: Settings, storage: Storage, job_id: uuid.UUID, owner: str) -> JobResource:
    with database.read() as transaction:
        job = queries.get(transaction, job_id, owner)
        return describe(job, settings.public_url, storage.link, queries.queue_position(transaction, job))


def _fingerprint(body: dict[str, Any]) -> str:
    return hashlib.sha256(msgspec.json.encode(body, order="deterministic")).hexdigest()


def _bare(idempotency_key: str | None) -> str | None:
    """The draft wants a quoted string; bare ones are accepted too."""
    if idempotency_key is None:
        return None
    bare = idempotency_key.strip().strip('"').strip()
    if not bare:
        raise InvalidRequest.field("Idempotency-Key", "must not be empty")
    return bare


def _wanted_wait_s(prefer: str | None) -> int | None:
    """RFC 7240: `wait=N` among comma-separated preferences."""
    found = re.search(r"(?:^|[,;])\s*wait\s*=\s*(\d{1,9})", prefer or "", re.IGNORECASE)
    return None if found is None else min(int(found[1]), LONGEST_WAIT_S)
