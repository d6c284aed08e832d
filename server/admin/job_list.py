"""The job list: the newest jobs, filtered by status, text, owner and time."""

from datetime import UTC, datetime
from typing import Annotated, Any

from litestar import Request, get
from litestar.params import QueryParameter
from litestar.response import Template

from server.admin.job_facts import image_links, run_time_s
from server.admin.rendering import render
from server.dependencies import NamedDatabase, NamedStorage
from zcore.errors import InvalidRequest
from zcore.jobs import queries, workers
from zcore.jobs.queries import COUNTED_AT_MOST, JobFilter
from zcore.jobs.states import State

JOBS_PER_PAGE = 30
AnyRequest = Request[Any, Any, Any]
Filter = Annotated[str, QueryParameter(max_length=200)]


@get("/", sync_to_thread=True)
def job_list(
    request: AnyRequest,
    database: NamedDatabase,
    storage: NamedStorage,
    status: Filter = "",
    text: Filter = "",
    owner: Annotated[str, QueryParameter(name="caller", max_length=200)] = "",
    created_from: Filter = "",
    created_before: Filter = "",
    cursor: Filter = "",
    newer: Filter = "",
) -> Template:
    """Show jobs, newest first. `cursor` selects the jobs older than it, `newer` the jobs newer than it."""
    job_filter = JobFilter(
        owner=owner or None,
        status=_state(status),
        text=text.strip() or None,
        created_from=_time("created_from", created_from),
        created_before=_time("created_before", created_before),
    )
    with database.read() as transaction:
        page = queries.page(transaction, job_filter, newer or cursor or None, JOBS_PER_PAGE, newer=bool(newer))
        counts = queries.counts_by_status(transaction)
        present = workers.present(transaction)
        now = transaction.now
    images = {job.id: image_links(job, storage) for job in page.jobs}
    filters = {
        "status": status,
        "text": text,
        "caller": owner,
        "created_from": created_from,
        "created_before": created_before,
    }
    context = {
        "page": page,
        "counts": {state: _count(count) for state, count in counts.items()},
        "jobs_waiting": counts[State.QUEUED] > 0,
        "workers": present,
        "filters": filters,
        "query": {name: value for name, value in filters.items() if value},
        "images": images,
        "run_times_s": {job.id: run_time_s(job, now) for job in page.jobs},
        "states": list(State),
    }
    return render(request, "job_list.html", context, [link for links in images.values() for link in links])


def _count(count: int) -> str:
    return f"{COUNTED_AT_MOST:,}+" if count >= COUNTED_AT_MOST else f"{count:,}"


def _state(text: str) -> State | None:
    try:
        return State(text) if text else None
    except ValueError as error:
        raise InvalidRequest.field("status", f"must be one of {', '.join(State)}") from error


def _time(name: str, text: str) -> datetime | None:
    """Parse the value of a `datetime-local` field. A value without a time zone is in UTC."""
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidRequest.field(name, "must be a date and time, such as 2030-01-31T18:00") from error
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
