"""The periodic tasks, one function each. Each may be interrupted at any point and run again."""

from collections.abc import Callable

from worker.maintenance.outages import Outages
from zcore.errors import StorageError
from zcore.jobs import claims, history, leftovers, partitions, queries, recovery, uploads, workers
from zcore.jobs.database import Database, DatabaseError, Transaction
from zcore.stages import Stage
from zcore.storage import Storage
from zcore.telemetry import log

# If no worker has been notified of a due job for this long, a worker is notified again. A worker that has received its
# notification claims the job within a fraction of this time.
NOTIFY_AGAIN_AFTER_S = 0.5
MAX_EXPIRED_PER_RUN = 50
LEFTOVERS_PER_BATCH = 3
"""So few that trying all of them during an outage of storage takes a short time."""
MAX_BATCHES_PER_RUN = 20
MAX_FORGOTTEN_PER_RUN = 2_000
FORGOTTEN_AT_ONCE = 250
"""Jobs that one transaction deletes. While it is open, no other can write to SQLite."""
MAX_KEYS_PER_STATEMENT = 5_000


def rescue_jobs(database: Database, outages: Outages, on_ended: Callable[[], None]) -> None:
    """Return jobs of dead workers to the queue, or end them. Calls `on_ended` if a job ended."""
    with database.write() as transaction:
        rescued = recovery.rescue(transaction, excused=outages.excuse_losses)
    for job in rescued:
        log.warning("job.rescued", job_id=str(job.id), attempt=job.attempt, status=job.status, worker=job.worker)
    if any(job.completed_at is not None for job in rescued):
        on_ended()


def notify_again(database: Database, notify_again: Callable[[Stage, int], None]) -> None:
    """Notify idle workers of due jobs that no worker has recently been notified of.

    `notify_again` gets a stage and the number of notifications that may be unread then: one for each such job, but no
    more than idle workers serve the stage. A busy worker claims its next job without a notification, and a worker that
    starts looks for jobs by itself.
    """
    unread: dict[Stage, int] = {}
    with database.write() as transaction:
        for stage in Stage:
            idle = workers.count_idle(transaction, stage)
            if idle and (marked := recovery.mark_notified(transaction, stage, NOTIFY_AGAIN_AFTER_S, idle)):
                unread[stage] = marked
    for stage, count in unread.items():
        notify_again(stage, count)


def promote_jobs(database: Database) -> None:
    """Make scheduled jobs ready that are due."""
    with database.write() as transaction:
        claims.promote(transaction)


def maintain_marks(database: Database) -> None:
    """Adapt the marks at which claims begin to the jobs that are in the queue."""
    with database.write() as transaction:
        claims.advance_marks(transaction)
        claims.repair_marks(transaction)


def expire_jobs(database: Database) -> None:
    """Mark the jobs as expired whose retention is over. Their images are deleted as leftovers."""
    with database.write() as transaction:
        jobs = queries.past_retention(transaction, MAX_EXPIRED_PER_RUN)
        expired = [job.id for job in jobs if recovery.expire(transaction, job.id) is not None]
    for job_id in expired:
        log.info("job.expired", job_id=str(job_id))


def expire_uploads(database: Database) -> None:
    """Delete the rows of uploads whose retention is over. Their bytes are deleted as leftovers."""
    with database.write() as transaction:
        expired = uploads.expire(transaction, MAX_EXPIRED_PER_RUN)
    if expired:
        log.info("uploads.expired", count=len(expired))


def delete_leftovers(database: Database, storage: Storage, is_leading: Callable[[], bool]) -> None:
    """Delete the objects that belong to no row, then the rows of `leftovers` that name them.

    Objects become superfluous in any process, and a lost worker may store its last one later, so only this task deletes
    them. Keys are computed; storage is not listed. Whatever is claimed is also tried; what cannot be deleted is tried
    again later, and stops nothing else. If nothing of a batch can be deleted, storage is away until the next run.
    """
    for _ in range(MAX_BATCHES_PER_RUN):
        with database.write() as transaction:
            due = leftovers.claim_due(transaction, LEFTOVERS_PER_BATCH)
        deleted = 0
        for one in due:
            if not is_leading():
                return
            try:
                storage.delete(leftovers.keys(one))
            except StorageError as fault:
                log.warning("leftovers.deletion_failed", error=fault.message)
                continue
            with database.write() as transaction:
                leftovers.forget(transaction, one)
            deleted += 1
        if deleted == 0:
            return


def forget_old_rows(database: Database) -> None:
    """Delete old idempotency keys, and workers that have not been seen for a day.

    After a pause of maintenance there may be millions of keys: more than one statement may take time for.
    """
    with database.write() as transaction:
        workers.forget_lost(transaction)
    more = True
    while more:
        with database.write() as transaction:
            more = recovery.forget_idempotency_keys(transaction, MAX_KEYS_PER_STATEMENT)


def forget_old_jobs(database: Database, history_s: float) -> None:
    """Delete jobs that ended more than `history_s` seconds ago: whole weeks if possible, and some others."""
    with database.read() as transaction:
        old = history.old_partitions(transaction, history_s)
        ended_before = history.end_of_history(transaction, history_s)
    for partition in old:
        with database.write(partitions.PATIENT_LIMITS) as transaction:
            dropped = partitions.drop(transaction, partition, ended_before)
        if dropped:
            log.info("jobs.partition_dropped", partition=partition.name)
    if deleted := _repeat(database, lambda transaction: history.forget(transaction, history_s, FORGOTTEN_AT_ONCE)):
        log.info("jobs.forgotten", count=deleted)
    _repeat(database, lambda transaction: history.forget_terms(transaction, FORGOTTEN_AT_ONCE))


def add_partitions(database: Database) -> None:
    """Make the partitions of the weeks to come (PostgreSQL only).

    If maintenance was away so long that jobs are in the last partition, which has no end, that one is given an end. Its
    rows are read for this, but not under a lock that others wait for.
    """
    with database.write(partitions.LIMITS) as transaction:
        if partitions.add_weeks(transaction):
            return
    with database.write(partitions.LIMITS) as transaction:
        partitions.add_bound(transaction)
    try:
        for table in partitions.KEYS:
            with database.write(partitions.PATIENT_LIMITS) as transaction:
                partitions.verify_bound(transaction, table)
        with database.write(partitions.LIMITS) as transaction:
            partitions.bound_last(transaction)
    except DatabaseError:
        with database.write() as transaction:
            partitions.remove_bound(transaction)
        raise


def _repeat(database: Database, delete: Callable[[Transaction], int]) -> int:
    """Call `delete` in one transaction after another until it finds no more, or has deleted enough for one run."""
    deleted = 0
    while deleted < MAX_FORGOTTEN_PER_RUN:
        with database.write() as transaction:
            count = delete(transaction)
        deleted += count
        if count < FORGOTTEN_AT_ONCE:
            break
    return deleted
