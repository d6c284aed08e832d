"""The page of one job, with its actions: cancel it, retry it, resend its webhook.

Each action redirects back to the page. `zcore.jobs` decides which actions a job allows.
"""

import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any

from litestar import Request, get, post
from litestar.params import FromPath, QueryParameter
from litestar.response import Redirect, Template

from server.admin.job_facts import image_links, run_time_s
from server.admin.rendering import render
from server.admin.sessions import ADMIN_PATH, add_notice
from server.dependencies import NamedDatabase, NamedNotifier, NamedSettings, NamedStorage
from zcore.errors import Conflict, NotFound
from zcore.jobs import lifecycle, queries, states, webhooks
from zcore.jobs.models import WebhookEvent
from zcore.jobs.states import TERMINAL, State
from zcore.request import GenerationRequest
from zcore.stages import Stage

REFRESH_S = 3
METRICS_ORDER = ("queue_ms", "encode_ms", "denoise_ms", "decode_ms", "upload_ms", "total_ms")
DUE_SOON = timedelta(seconds=30)
AnyRequest = Request[Any, Any, Any]


@get("/jobs/{job_id:str}", sync_to_thread=True)
def job_page(
    request: AnyRequest,
    job_id: FromPath[str],
    database: NamedDatabase,
    storage: NamedStorage,
    paused: Annotated[str, QueryParameter(max_length=200)] = "",
) -> Template:
    """Show everything known about one job. The page refreshes while the job changes, unless `paused` is set."""
    with database.read() as transaction:
        job = queries.get(transaction, _parse_job_id(job_id))
        timeline = queries.timeline(transaction, job.id)
        position = queries.queue_position(transaction, job)
        now = transaction.now
    request_facts = _ordered(job.request, GenerationRequest.__struct_fields__)
    del request_facts["prompt"]  # shown in its own section
    images = image_links(job, storage)
    changing = job.status not in TERMINAL or any(_is_due(event, now) for event, _ in timeline.webhooks)
    context = {
        "job": job,
        "request_facts": request_facts,
        "metrics": _ordered(job.metrics, METRICS_ORDER),
        "timeline": timeline,
        "position": position,
        "run_time_s": run_time_s(job, now),
        "images": images,
        "can_cancel": job.status not in TERMINAL and job.cancel_requested_at is None,
        "can_retry": job.status in states.RETRY.sources,
        "changing": changing,
        "refresh_s": REFRESH_S if changing and not paused else None,
    }
    return render(request, "job.html", context, images)


@post("/jobs/{job_id:str}/cancel", sync_to_thread=True)
def cancel(request: AnyRequest, job_id: FromPath[str], database: NamedDatabase) -> Redirect:
    """Cancel a queued job immediately, or a running one at its next step."""
    with database.write() as transaction:
        job = lifecycle.cancel(transaction, _parse_job_id(job_id))
    if job.status == State.CANCELED:
        add_notice(request, "The job was canceled.")
    elif job.status == State.RUNNING:
        add_notice(request, "Cancellation requested. The worker will stop at its next step.")
    else:
        add_notice(request, f"The job was not canceled: it has already ended ({job.status}).", refused=True)
    return _redirect_to_job(job.id)


@post("/jobs/{job_id:str}/retry", sync_to_thread=True)
def retry(
    request: AnyRequest,
    job_id: FromPath[str],
    database: NamedDatabase,
    settings: NamedSettings,
    notifier: NamedNotifier,
) -> Redirect:
    """Return a failed or canceled job to the queue with all its attempts restored."""
    parsed_id = _parse_job_id(job_id)
    try:
        with database.write() as transaction:
            job = lifecycle.retry(transaction, parsed_id, settings.jobs.max_attempts, settings.jobs.first_stage)
    except Conflict as conflict:
        add_notice(request, f"The job was not changed: {conflict.message}.", refused=True)
    else:
        notifier.notify(Stage(job.stage))
        add_notice(request, "The job is back in the queue.")
    return _redirect_to_job(parsed_id)


@post("/jobs/{job_id:str}/webhooks/{event_id:uuid}/resend", sync_to_thread=True)
def resend(
    request: AnyRequest, job_id: FromPath[str], event_id: FromPath[uuid.UUID], database: NamedDatabase
) -> Redirect:
    """Make the webhook event due immediately, with a fresh retry schedule."""
    parsed_id = _parse_job_id(job_id)
    with database.write() as transaction:
        webhooks.resend(transaction, parsed_id, event_id)
    add_notice(request, "The webhook will be sent again shortly.")
    return _redirect_to_job(parsed_id)


def _redirect_to_job(job_id: uuid.UUID) -> Redirect:
    return Redirect(f"{ADMIN_PATH}/jobs/{job_id}", status_code=303)


def _ordered(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the values in the order of `names`, then the others; JSONB does not preserve order."""
    return {name: values[name] for name in names if name in values} | dict(values)


def _is_due(event: WebhookEvent, now: datetime) -> bool:
    return event.next_attempt_at is not None and event.next_attempt_at < now + DUE_SOON


def _parse_job_id(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(text)
    except ValueError as error:
        raise NotFound(f"there is no job {text}") from error
