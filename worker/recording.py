"""Writes to the durable record that outlast a short outage of the database.

Every write names the token of the lease, so repeating it changes nothing that is already written.
"""

import time
from collections.abc import Callable, Collection

from worker.backoff import pauses
from worker.heartbeat import Heartbeat
from zcore.jobs import queries
from zcore.jobs.database import Database, DatabaseError, Transaction, temporary_fault
from zcore.jobs.models import Job
from zcore.telemetry import log

RETRY_BACKOFF_S = (0.1, 0.2, 0.5, 1.0)


def record(
    database: Database, heartbeat: Heartbeat, events: Collection[str], write: Callable[[Transaction], Job | None]
) -> Job | None:
    """Return the job after `write`, or None if the lease is lost.

    `write` adds one of `events` to the timeline of this attempt. While the database does not answer and the lease is
    valid, it is repeated. If an answer was lost, the write may have taken place, and the repeated one is refused; only
    the holder of the token can have added the event, so the timeline shows which it was. Raises `DatabaseError`.
    """
    job_id = heartbeat.lease.job_id
    is_repeated = False
    pauses_s = pauses(RETRY_BACKOFF_S)
    while True:
        try:
            with database.write() as transaction:
                job = write(transaction)
                if job is None and is_repeated and queries.has_event(transaction, job_id, heartbeat.attempt, events):
                    return queries.get(transaction, job_id)
                return job
        except DatabaseError as fault:
            if not (temporary_fault(fault) is not None and heartbeat.holds_lease):
                raise
            log.warning("job.write_repeated", expected=sorted(events), error=type(fault).__name__)
        is_repeated = True
        time.sleep(next(pauses_s))
