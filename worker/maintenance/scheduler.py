"""Runs the maintenance of an installation in one of the processes that could.

A process that leads asks the database every interval what there is to do, with one statement, and does only that. The
others look only when the leader's term should be over. Every change is guarded, so two leaders would do no harm. Tasks
that use storage run in a thread of their own: while storage hangs, jobs are rescued and workers notified all the same.
"""

import time
from collections.abc import Callable
from functools import partial

from worker.maintenance import tasks
from worker.maintenance.leadership import WORK, Leadership
from worker.maintenance.outages import Outages
from worker.maintenance.sweep import StorageSweep
from worker.periodic import PeriodicTask
from worker.shutdown import Shutdown
from zcore.errors import StorageError
from zcore.foreign_text import first_line
from zcore.jobs import agenda
from zcore.jobs.agenda import Agenda
from zcore.jobs.database import Database, DatabaseError
from zcore.stages import Stage
from zcore.storage import Storage
from zcore.telemetry import log

FORGET_INTERVAL_S = 600.0
PARTITIONS_INTERVAL_S = 600.0
HISTORY_INTERVAL_S = 60.0
MARKS_INTERVAL_S = 15.0
STORAGE_INTERVAL_S = 60.0
"""How often the thread of the tasks that use storage looks by itself; usually it is triggered."""

Task = tuple[str, Callable[[Agenda], bool], Callable[[], None]]
"""Name of a task, whether it is due by an agenda, and the task."""


class Maintenance:
    """The periodic tasks, and the threads that run them while this process leads."""

    def __init__(
        self,
        database: Database,
        storage: Storage,
        notify_again: Callable[[Stage, int], None],
        on_ended: Callable[[], None],
        interval_s: float,
        shutdown: Shutdown,
        sweep_min_age_s: float,
        history_s: float,
        lease_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Ask what there is to do every `interval_s` seconds. The sweep leaves objects younger than `sweep_min_age_s`.

        Jobs are deleted `history_s` seconds after their end, or never if that is 0. `lease_s` is how long a worker may
        have a job without renewing its lease. `notify_again` is that of `zcore.broker.Notifier`; `on_ended` is called
        when webhooks are due. `clock` returns seconds that pass steadily.
        """
        self._database = database
        self.leadership = Leadership(database, clock)
        self._outages = Outages(lease_s, clock)
        sweep = StorageSweep(database, storage, sweep_min_age_s, self.leadership)
        self._tasks: list[Task] = [
            ("rescue_jobs", lambda due: due.lost_jobs, partial(tasks.rescue_jobs, database, self._outages, on_ended)),
            ("promote_jobs", lambda due: due.scheduled_jobs, partial(tasks.promote_jobs, database)),
            (
                "notify_again",
                # What was just rescued or promoted is not in the agenda yet.
                lambda due: due.unnoticed_jobs or due.lost_jobs or due.scheduled_jobs,
                partial(tasks.notify_again, database, notify_again),
            ),
            ("deliver_webhooks", lambda due: due.webhooks, on_ended),
            ("expire_jobs", lambda due: due.expired_jobs, partial(tasks.expire_jobs, database)),
            ("expire_uploads", lambda due: due.expired_uploads, partial(tasks.expire_uploads, database)),
            ("maintain_marks", _every(MARKS_INTERVAL_S, clock), partial(tasks.maintain_marks, database)),
            ("forget_old_rows", _every(FORGET_INTERVAL_S, clock), partial(tasks.forget_old_rows, database)),
        ]
        if database.engine.dialect.name == "postgresql":
            add = partial(tasks.add_partitions, database)
            self._tasks.append(("add_partitions", _every(PARTITIONS_INTERVAL_S, clock), add))
        if history_s:
            forget = partial(tasks.forget_old_jobs, database, history_s)
            self._tasks.append(("forget_old_jobs", _every(HISTORY_INTERVAL_S, clock), forget))
        self._storage_tasks: list[Task] = [
            (
                "delete_leftovers",
                lambda due: due.superfluous_objects,
                partial(tasks.delete_leftovers, database, storage, self._is_leading),
            ),
            ("sweep", lambda due: due.sweep, sweep.run),
        ]
        self._due_in_storage: Agenda | None = None
        self._thread = PeriodicTask("maintenance", self._look, interval_s, shutdown)
        self._storage_thread = PeriodicTask("maintenance_storage", self._use_storage, STORAGE_INTERVAL_S, shutdown)

    def start(self) -> None:
        """Run the tasks whenever this process leads, until shutdown begins."""
        self._storage_thread.start()
        self._thread.start()

    def stop(self) -> None:
        """Stop, wait for the current tasks, and let another process lead."""
        self._thread.stop()
        self._storage_thread.stop()
        try:
            self.leadership.resign()
        except DatabaseError as fault:
            log.warning("maintenance.resignation_failed", error=type(fault).__name__)

    def run_once(self) -> None:
        """Do everything that is due, if this process leads."""
        due = self._ask()
        if due is not None:
            self._run(self._tasks, due)
            self._run(self._storage_tasks, due)

    def _look(self) -> None:
        due = self._ask()
        if due is None:
            return
        self._run(self._tasks, due)
        if due.needs_storage:
            self._due_in_storage = due
            self._storage_thread.trigger()

    def _use_storage(self) -> None:
        due, self._due_in_storage = self._due_in_storage, None
        if due is not None:
            self._run(self._storage_tasks, due)

    def _ask(self) -> Agenda | None:
        """Return what is due; None if this process does not lead, or the database does not answer."""
        try:
            due = self._ask_as_leader() if self.leadership.seek() else None
        except DatabaseError as fault:
            self._outages.note_failure()
            log.warning("maintenance.database_failed", error=first_line(f"{type(fault).__name__}: {fault}"))
            return None
        self._outages.note_answer()
        return due

    def _ask_as_leader(self) -> Agenda | None:
        with self._database.read() as transaction:
            due = agenda.ask(transaction, WORK, self.leadership.holder, tasks.NOTIFY_AGAIN_AFTER_S)
        if due.is_leader:
            return due
        self.leadership.lose()
        return None

    def _run(self, chosen: list[Task], due: Agenda) -> None:
        """Run the tasks that are due. If one fails, its error is logged and the next one runs."""
        for name, is_due, run in chosen:
            if not self._is_leading():
                return
            if not is_due(due):
                continue
            try:
                run()
            except (DatabaseError, StorageError) as fault:
                log.warning("maintenance.task_failed", task=name, error=first_line(f"{type(fault).__name__}: {fault}"))
            except Exception as fault:
                # If a defect in one task stopped the others, jobs of lost workers would never be rescued.
                log.error("maintenance.task_crashed", task=name, exc_info=fault)

    def _is_leading(self) -> bool:
        return self.leadership.is_held


def _every(interval_s: float, clock: Callable[[], float]) -> Callable[[Agenda], bool]:
    """Return a condition that is true once every `interval_s` seconds."""
    next_at = float("-inf")

    def is_due(_due: Agenda) -> bool:
        nonlocal next_at
        now = clock()
        if now < next_at:
            return False
        next_at = now + interval_s
        return True

    return is_due
