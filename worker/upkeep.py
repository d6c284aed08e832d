"""The clock that puts right what was lost: jobs of dead workers, unheard rings, pictures past their retention,
embeddings that nobody needs any more.

Takes the database, the storage and a doorbell; `tick` does each chore once. Any number may run at once, on any hosts:
every chore is a guarded change. `python -m worker.upkeep` runs it (and the delivery of webhooks) without a GPU.
"""

import threading
import time
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

from worker import embeddings, pictures
from worker.shutdown import Shutdown
from zcore.errors import StorageError
from zcore.jobs import inputs, lifecycle, presence, queries
from zcore.jobs.database import Database
from zcore.stages import Stage
from zcore.storage import Storage
from zcore.telemetry import log

# A due job that nobody was told of for this long is announced again.
SILENT_S = 5.0
EXPIRED_AT_ONCE = 50
CLEARED_AT_ONCE = 200
FORGET_EVERY_S = 600.0


class Upkeep:
    """The chores, and the thread that does them every `interval_s` seconds."""

    def __init__(
        self,
        database: Database,
        storage: Storage,
        announce: Callable[[Stage], None],
        on_ended: Callable[[], None],
        interval_s: float,
        shutdown: Shutdown,
    ) -> None:
        """`announce` rings once for a stage; `on_ended` is called when a chore ended a job."""
        self._database = database
        self._storage = storage
        self._announce = announce
        self._on_ended = on_ended
        self._interval_s = interval_s
        self._shutdown = shutdown
        self._forget_at = 0.0
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)

    def start(self) -> None:
        """Ticks from now on, until shutdown."""
        self._thread.start()

    def stop(self) -> None:
        """Waits for the tick under way."""
        self._thread.join()

    def tick(self) -> None:
        """Every chore once. One that fails is logged and does not keep the others from their turn."""
        chores = (
            self._rescue,
            self._announce_again,
            self._expire,
            self._clear_embeddings,
            self._expire_inputs,
            self._forget,
        )
        for chore in chores:
            try:
                chore()
            except (SQLAlchemyError, StorageError) as fault:
                error = f"{type(fault).__name__}: {fault}".partition("\n")[0]
                log.warning("upkeep.failed", chore=chore.__name__.strip("_"), error=error)
            except Exception as fault:
                # A clock that stops over a defect would strand every job of a lost worker.
                log.error("upkeep.crashed", chore=chore.__name__.strip("_"), exc_info=fault)

    def _run(self) -> None:
        while not self._shutdown.wait(self._interval_s):
            self.tick()

    def _rescue(self) -> None:
        with self._database.write() as transaction:
            rescued = lifecycle.rescue(transaction)
        for job in rescued:
            log.warning("job.rescued", job_id=str(job.id), attempt=job.attempt, status=job.status, worker=job.worker)
        ended = [job for job in rescued if job.completed_at is not None]
        if ended:
            self._on_ended()
        for job in ended:
            # Its workers may have died between storing pictures and saying so.
            attempts = range(1, job.attempt + 1)
            count, stored_as = int(job.request["n"]), pictures.format_of(job.request)
            self._storage.delete(pictures.keys_of(job.id, attempts, count, stored_as))

    def _announce_again(self) -> None:
        """One ring for each idle worker of a stage: busy ones take what is due by themselves, and rings that nobody
        hears pile up.

        Where no worker is seen one ring is tried all the same.
        """
        silent: dict[Stage, int] = {}
        with self._database.write() as transaction:
            present = presence.present(transaction)
            busy = queries.busy_workers(transaction)
            for stage in Stage:
                serving = [worker.name for worker in present if stage in worker.stages]
                idle = len(set(serving) - busy) if serving else 1
                silent[stage] = lifecycle.mark_announced(transaction, stage, SILENT_S, idle) if idle else 0
        for stage, rings in silent.items():
            for _ in range(rings):
                self._announce(stage)

    def _expire(self) -> None:
        """Pictures first: a crash in between leaves the job as it was, and the next tick deletes again."""
        with self._database.read() as transaction:
            past = queries.past_retention(transaction, EXPIRED_AT_ONCE)
        for job in past:
            try:
                self._storage.delete([output.key for output in job.outputs])
            except StorageError as fault:
                log.warning("job.not_expired", job_id=str(job.id), error=fault.message)
                continue
            with self._database.write() as transaction:
                expired = lifecycle.expire(transaction, job.id)
            if expired is not None:
                log.info("job.expired", job_id=str(job.id))

    def _clear_embeddings(self) -> None:
        """Objects first, as with pictures. Jobs may have ended anywhere, so only the clock does this."""
        with self._database.read() as transaction:
            ended = queries.ended_with_embedding(transaction, CLEARED_AT_ONCE)
        if not ended:
            return
        self._storage.delete(key for job in ended for key in embeddings.keys_of(job.id, range(1, job.attempt + 1)))
        with self._database.write() as transaction:
            for job in ended:
                lifecycle.forget_embeddings(transaction, job.id, job.attempt)

    def _expire_inputs(self) -> None:
        """Bytes first, their rows locked: an upload of the same bytes waits, and then stores them again."""
        with self._database.write() as transaction:
            past = inputs.past_retention(transaction, EXPIRED_AT_ONCE)
            self._storage.delete([inputs.key_of(row.owner, row.sha256) for row in past])
            for row in past:
                transaction.session.delete(row)
        if past:
            log.info("inputs.expired", count=len(past))

    def _forget(self) -> None:
        if time.monotonic() < self._forget_at:
            return
        self._forget_at = time.monotonic() + FORGET_EVERY_S
        with self._database.write() as transaction:
            lifecycle.forget_idempotency_keys(transaction)
            presence.forget_lost(transaction)


if __name__ == "__main__":
    import sys

    from worker.app import run_upkeep

    run_upkeep(sys.argv[1:])
