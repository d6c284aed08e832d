"""The admin: sign in, look through the jobs, open one, cancel it, retry it, tell its webhook again.

Takes forms and addresses below `/admin`; gives pages rendered from `templates/pages/`, which need no JavaScript, and
answers every form with a redirect. `admin_routes`, `template_config` and `answer_people` are what `app` wires; the
assets and `page_headers` serve the playground too. What may happen to a job is decided in `zcore.jobs`; who may look is
decided in `sessions`.
"""

import hashlib
import hmac
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, cast
from urllib.parse import urlsplit

import jinja2
from litestar import Request, Response, Router, get, post
from litestar.di import NamedDependency, Provide
from litestar.params import FromPath, QueryParameter, SkipValidation
from litestar.plugins.jinja import JinjaTemplateEngine
from litestar.response import File, Redirect, Template
from litestar.template import TemplateConfig
from litestar.types import ControllerRouterHandler

from server.dependencies import NamedDatabase, NamedDoorbell, NamedSettings, NamedStorage
from server.sessions import (
    ADMIN_PATH,
    OPEN_TO_ALL,
    FailedTries,
    SignedOut,
    admit,
    cookie_session,
    form_token,
    is_signed_in,
    notify,
    sign_in,
    sign_out,
    take_notice,
    want,
)
from zcore.errors import Conflict, InvalidRequest, NotFound
from zcore.jobs import lifecycle, presence, queries, states, webhooks
from zcore.jobs.models import Job, WebhookEvent
from zcore.jobs.queries import COUNTED_AT_MOST, JobFilter
from zcore.jobs.states import TERMINAL, State
from zcore.request import GenerationRequest
from zcore.settings import TREE
from zcore.stages import Stage
from zcore.storage import Storage

PAGES_PATH = TREE / "templates" / "pages"
ASSETS_PATH = PAGES_PATH / "assets"
ASSETS = ("style.css", "icon.svg", "playground.css", "playground.js")
JOBS_ON_A_PAGE = 30
REFRESH_S = 3
METRICS = ("queue_ms", "encode_ms", "denoise_ms", "decode_ms", "upload_ms", "total_ms")
SOON = timedelta(seconds=30)
AnyRequest = Request[Any, Any, Any]
NamedAdminKey = NamedDependency[SkipValidation[str]]
NamedFailedTries = NamedDependency[SkipValidation[FailedTries]]
Filter = Annotated[str, QueryParameter(max_length=200)]


def admin_routes(admin_key: str, public_url: str) -> list[ControllerRouterHandler]:
    """Everything below `/admin`."""
    parts = {"admin_key": admin_key, "failed_tries": FailedTries()}
    pages = Router(
        ADMIN_PATH,
        route_handlers=[sign_in_page, enter, leave, history, job_page, cancel, retry, resend],
        dependencies={name: _same(part) for name, part in parts.items()},
        guards=[admit],
        middleware=[cookie_session(admin_key, public_url)],
        exception_handlers={SignedOut: _to_sign_in},
        include_in_schema=False,
    )
    return [pages, asset]


def template_config() -> TemplateConfig[JinjaTemplateEngine]:
    """The pages' templates; a name that a template does not get is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES_PATH),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"moment": _moment, "duration": _duration, "size": _size, "measure": _measure}
    cast(dict[str, Any], environment.globals)["assets_version"] = _assets_version()
    return TemplateConfig(instance=JinjaTemplateEngine.from_environment(environment))


def answer_people(
    handlers: Mapping[int | type[Exception], Callable[[AnyRequest, Any], Response[dict[str, Any]]]],
) -> dict[int | type[Exception], Callable[[AnyRequest, Any], Response[Any]]]:
    """The same exception handlers, whose problems are pages below `/admin`."""
    return {kind: _as_page(handler) for kind, handler in handlers.items()}


def page_headers(pictures: Sequence[str], *, scripted: bool = False) -> dict[str, str]:
    """Nothing is framed, nothing is fetched but our own style and what stands where the pictures do, and nothing runs.

    On a `scripted` page our own script does: it calls this server alone, and shows files that its reader chose.
    """
    parts = [urlsplit(link) for link in pictures]
    own = ["'self'", "blob:"] if scripted else ["'self'"]
    images = " ".join([*own, *sorted({f"{part.scheme}://{part.netloc}" for part in parts})])
    policy = (
        f"default-src 'none'; style-src 'self'; img-src {images}; form-action 'self'; "
        "frame-ancestors 'none'; base-uri 'none'"
    )
    return {
        "content-security-policy": f"{policy}; script-src 'self'; connect-src 'self'" if scripted else policy,
        "cache-control": "no-store",
        "referrer-policy": "same-origin",
        "x-content-type-options": "nosniff",
    }


@get(f"{ADMIN_PATH}/assets/{{name:str}}", include_in_schema=False, sync_to_thread=False)
def asset(name: FromPath[str]) -> File:
    """The pages' styles, script and icon. Their addresses hold their version, so browsers may keep them."""
    if name not in ASSETS:
        raise NotFound(f"there is no asset {name}")
    headers = {"cache-control": "public, max-age=31536000, immutable", "x-content-type-options": "nosniff"}
    return File(ASSETS_PATH / name, filename=name, content_disposition_type="inline", headers=headers)


@get("/sign-in", opt={OPEN_TO_ALL: True}, sync_to_thread=False)
def sign_in_page(request: AnyRequest) -> Response[Any]:
    """Asks for the admin key."""
    return Redirect(ADMIN_PATH, status_code=303) if is_signed_in(request) else _sign_in_form(request)


@post("/sign-in", opt={OPEN_TO_ALL: True})
async def enter(request: AnyRequest, admin_key: NamedAdminKey, failed_tries: NamedFailedTries) -> Response[Any]:
    """Begins a session where the key is right."""
    given = str((await request.form()).get("key", ""))
    client = request.client.host if request.client else ""
    wait_s = math.ceil(failed_tries.wait_s(client))
    if wait_s:
        fault = f"Too many wrong keys. Try again in {wait_s} s."
        return _sign_in_form(request, fault, status_code=429, headers={"retry-after": str(wait_s)})
    if not hmac.compare_digest(given.strip().encode(), admin_key.strip().encode()):
        failed_tries.count(client)
        return _sign_in_form(request, "That is not the admin key.", status_code=403)
    return Redirect(sign_in(request), status_code=303)


@post("/sign-out", sync_to_thread=False)
def leave(request: AnyRequest) -> Redirect:
    """Ends the session."""
    sign_out(request)
    notify(request, "You are signed out.")
    return Redirect(f"{ADMIN_PATH}/sign-in", status_code=303)


@get("/", sync_to_thread=True)
def history(
    request: AnyRequest,
    database: NamedDatabase,
    storage: NamedStorage,
    status: Filter = "",
    text: Filter = "",
    caller: Filter = "",
    created_from: Filter = "",
    created_before: Filter = "",
    cursor: Filter = "",
    newer: Filter = "",
) -> Template:
    """The jobs, newest first. `cursor` leads to the jobs before it, `newer` to those after it."""
    wanted = JobFilter(
        owner=caller or None,
        status=_state(status),
        text=text.strip() or None,
        created_from=_time("created_from", created_from),
        created_before=_time("created_before", created_before),
    )
    with database.read() as transaction:
        page = queries.page(transaction, wanted, newer or cursor or None, JOBS_ON_A_PAGE, newer=bool(newer))
        counts = queries.counts_by_status(transaction)
        workers = presence.present(transaction)
    pictures = {job.id: _pictures(job, storage) for job in page.jobs}
    given = {
        "status": status,
        "text": text,
        "caller": caller,
        "created_from": created_from,
        "created_before": created_before,
    }
    context = {
        "page": page,
        "counts": {state: _counted(count) for state, count in counts.items()},
        "waiting": counts[State.QUEUED] > 0,
        "workers": workers,
        "filters": given,
        "query": {name: value for name, value in given.items() if value},
        "pictures": pictures,
        "ran_s": {job.id: _ran_s(job, transaction.now) for job in page.jobs},
        "states": list(State),
    }
    return _page(request, "history.html", context, [link for links in pictures.values() for link in links])


@get("/jobs/{job_id:str}", sync_to_thread=True)
def job_page(
    request: AnyRequest,
    job_id: FromPath[str],
    database: NamedDatabase,
    storage: NamedStorage,
    still: Filter = "",
) -> Template:
    """One job with everything that is known of it; `still` keeps the page from reloading itself."""
    with database.read() as transaction:
        job = queries.get(transaction, _job_id(job_id))
        timeline = queries.timeline(transaction, job.id)
        position = queries.queue_position(transaction, job)
    request_facts = _in_order(job.request, GenerationRequest.__struct_fields__)
    del request_facts["prompt"]  # shown by itself
    pictures = _pictures(job, storage)
    moving = job.status not in TERMINAL or any(_is_due(event, transaction.now) for event, _ in timeline.webhooks)
    context = {
        "job": job,
        "request_facts": request_facts,
        "metrics": _in_order(job.metrics, METRICS),
        "timeline": timeline,
        "position": position,
        "ran_s": _ran_s(job, transaction.now),
        "pictures": pictures,
        "may_cancel": job.status not in TERMINAL and job.cancel_requested_at is None,
        "may_retry": job.status in states.RETRY.sources,
        "moving": moving,
        "refresh_s": REFRESH_S if moving and not still else None,
    }
    return _page(request, "job.html", context, pictures)


@post("/jobs/{job_id:str}/cancel", sync_to_thread=True)
def cancel(request: AnyRequest, job_id: FromPath[str], database: NamedDatabase) -> Redirect:
    """A queued job ends at once, a running one at its next step."""
    with database.write() as transaction:
        job = lifecycle.cancel(transaction, _job_id(job_id))
    if job.status == State.CANCELED:
        notify(request, "The job is canceled.")
    elif job.status == State.RUNNING:
        notify(request, "The worker will stop at its next step.")
    else:
        notify(request, f"The job had already ended: it is {job.status}.", refused=True)
    return _to_job(job.id)


@post("/jobs/{job_id:str}/retry", sync_to_thread=True)
def retry(
    request: AnyRequest,
    job_id: FromPath[str],
    database: NamedDatabase,
    settings: NamedSettings,
    doorbell: NamedDoorbell,
) -> Redirect:
    """A failed or canceled job goes back to the queue with a fresh budget of attempts."""
    found = _job_id(job_id)
    try:
        with database.write() as transaction:
            job = lifecycle.retry(transaction, found, settings.jobs.max_attempts, settings.jobs.first_stage)
    except Conflict as conflict:
        notify(request, f"Nothing was changed: {conflict.message}.", refused=True)
    else:
        doorbell.announce(Stage(job.stage))
        notify(request, "The job is back in the queue.")
    return _to_job(found)


@post("/jobs/{job_id:str}/webhooks/{event_id:uuid}/resend", sync_to_thread=True)
def resend(
    request: AnyRequest, job_id: FromPath[str], event_id: FromPath[uuid.UUID], database: NamedDatabase
) -> Redirect:
    """The event is due at once, with a fresh schedule."""
    with database.write() as transaction:
        webhooks.resend(transaction, event_id)
    notify(request, "The webhook will be sent again now.")
    return _to_job(_job_id(job_id))


def _sign_in_form(
    request: AnyRequest, fault: str = "", *, status_code: int = 200, headers: Mapping[str, str] | None = None
) -> Template:
    return _page(request, "sign_in.html", {"fault": fault}, status_code=status_code, headers=headers)


def _to_sign_in(request: AnyRequest, _: SignedOut) -> Redirect:
    want(request)
    return Redirect(f"{ADMIN_PATH}/sign-in", status_code=303)


def _to_job(job_id: uuid.UUID) -> Redirect:
    return Redirect(f"{ADMIN_PATH}/jobs/{job_id}", status_code=303)


def _as_page(handler: Callable[[AnyRequest, Any], Response[dict[str, Any]]]) -> Callable[..., Response[Any]]:
    def answer(request: AnyRequest, fault: Any) -> Response[Any]:
        problem = handler(request, fault)
        if request.url.path != ADMIN_PATH and not request.url.path.startswith(f"{ADMIN_PATH}/"):
            return problem
        context = {"title": problem.content["title"], "detail": problem.content["detail"]}
        headers = page_headers(()) | problem.headers
        return Template("error.html", context=context, status_code=problem.content["status"], headers=headers)

    return answer


def _page(
    request: AnyRequest,
    template: str,
    context: Mapping[str, Any],
    pictures: Sequence[str] = (),
    *,
    status_code: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Template:
    shared = {"form_token": form_token(request), "notice": take_notice(request)}
    all_headers = {**page_headers(pictures), **(headers or {})}
    return Template(template, context={**context, **shared}, status_code=status_code, headers=all_headers)


def _pictures(job: Job, storage: Storage) -> list[str]:
    """A link for each output, by its position; none once they were deleted."""
    return [] if job.status == State.EXPIRED else [storage.link(output.key).url for output in job.outputs]


def _ran_s(job: Job, now: datetime) -> float | None:
    """Seconds since the last claim, or from it to the end; None where nothing runs or ran."""
    if job.started_at is None or job.status == State.QUEUED:
        return None
    return ((job.completed_at or now) - job.started_at).total_seconds()


def _in_order(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """JSONB keeps no order: these names first, then the others."""
    return {name: values[name] for name in names if name in values} | dict(values)


def _is_due(event: WebhookEvent, now: datetime) -> bool:
    return event.next_attempt_at is not None and event.next_attempt_at < now + SOON


def _counted(count: int) -> str:
    return f"{COUNTED_AT_MOST:,}+" if count >= COUNTED_AT_MOST else f"{count:,}"


def _job_id(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(text)
    except ValueError as fault:
        raise NotFound(f"there is no job {text}") from fault


def _state(text: str) -> State | None:
    try:
        return State(text) if text else None
    except ValueError as fault:
        raise InvalidRequest.field("status", f"has to be one of {', '.join(State)}") from fault


def _time(name: str, text: str) -> datetime | None:
    """What a `datetime-local` field sends, which names no zone: UTC."""
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as fault:
        raise InvalidRequest.field(name, "has to be a time, as in 2030-01-31T18:00") from fault
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment


def _moment(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def _duration(seconds: float) -> str:
    """As exact as its size deserves: `18 ms`, `4.2 s`, `3 min 05 s`, `2 h 40 min`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02d} min"


def _size(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    return f"{count / 1000:.0f} kB" if count < 1_000_000 else f"{count / 1_000_000:.1f} MB"


def _measure(value: Any, name: str) -> str:
    """A metric by the unit that its name ends in."""
    if name.endswith("_ms") and isinstance(value, int | float):
        return _duration(value / 1000)
    if name.endswith("_mb") and isinstance(value, int | float):
        return f"{value:,} MB"
    return str(value)


def _assets_version() -> str:
    return hashlib.sha256(b"".join((ASSETS_PATH / name).read_bytes() for name in ASSETS)).hexdigest()[:12]


def _same(part: object) -> Provide:
    return Provide(lambda: part, sync_to_thread=False)
