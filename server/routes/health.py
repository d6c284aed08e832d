"""Whether this process lives, and whether it can accept work."""

from litestar import Response, get
from sqlalchemy.exc import SQLAlchemyError

from server.dependencies import NamedDatabase
from server.schemas import Health
from zcore.jobs import presence


@get("/health/live", tags=["health"], summary="Whether the process answers", sync_to_thread=False)
def live() -> dict[str, str]:
    """Always 200: restart the process when this does not answer."""
    return {"status": "ok"}


@get("/health/ready", tags=["health"], summary="Whether submissions can be accepted", sync_to_thread=True)
def ready(database: NamedDatabase) -> Response[Health]:
    """200 when the database takes jobs, else 503.

    Jobs are accepted without workers; `workers` says how many there are.
    """
    try:
        with database.read() as transaction:
            workers = len(presence.present(transaction))
    except SQLAlchemyError:
        return Response(Health("unavailable", database=False, workers=0), status_code=503)
    return Response(Health("ok", database=True, workers=workers))
