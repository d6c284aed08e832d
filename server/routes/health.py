"""Liveness and readiness of this process."""

from litestar import Response, get
from litestar.openapi.datastructures import ResponseSpec

from server.dependencies import NamedDatabase, NamedDrain
from server.schemas import Health, Liveness
from zcore.jobs import workers
from zcore.jobs.database import DatabaseError
from zcore.telemetry import log


@get("/health/live", tags=["health"], summary="Check that the process responds", sync_to_thread=False)
def check_liveness() -> Liveness:
    """Always answers 200. Restart the process if it does not answer."""
    return Liveness()


@get(
    "/health/ready",
    tags=["health"],
    summary="Check that submissions can be accepted",
    responses={503: ResponseSpec(Health, description="The database takes no jobs, or the process is being stopped")},
    sync_to_thread=True,
)
def check_readiness(database: NamedDatabase, drain: NamedDrain) -> Response[Health]:
    """Answers 200 if the database takes jobs: it answers, can be written and is migrated. Otherwise 503.

    A process that is being stopped answers 503 too, and accepts submissions for `server.drain_s` seconds more.

    Submissions are accepted even without workers; `workers` is the number of workers that are present.
    """
    try:
        reason = database.unready_reason()
        if reason is None:
            with database.read() as transaction:
                present = workers.count_present(transaction)
            if drain.has_begun:
                return Response(Health("draining", database=True, workers=present), status_code=503)
            return Response(Health("ok", database=True, workers=present))
    except DatabaseError as error:
        reason = type(error).__name__
    log.warning("readiness.failed", reason=reason)
    return Response(Health("unavailable", database=False, workers=0), status_code=503)
