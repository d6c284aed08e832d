"""Waiting for jobs to end, for any number of waiting requests with one query at a time.

Takes the database; `ended` sleeps until a job is terminal or the time is over. Does not change anything: a wait that
ends, or a caller that leaves, cancels nothing.
"""

import asyncio
import uuid
from collections import defaultdict
from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from zcore.jobs.database import Database
from zcore.jobs.models import Job
from zcore.jobs.states import TERMINAL
from zcore.telemetry import log

LOOK_EVERY_S = 0.1
ASKED_AT_ONCE = 500


class Watch:
    """Looks for ended jobs ten times a second, only while somebody waits."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: defaultdict[uuid.UUID, set[asyncio.Event]] = defaultdict(set)
        self._looking: asyncio.Task[None] | None = None
        self._released = False

    async def ended(self, job_id: uuid.UUID, timeout_s: float) -> None:
        """Returns when the job is terminal, or after `timeout_s` seconds."""
        event = asyncio.Event()
        self._waiting[job_id].add(event)
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        try:
            await asyncio.wait_for(event.wait(), timeout_s)
        except TimeoutError:
            pass
        finally:
            self._waiting[job_id].discard(event)
            if not self._waiting[job_id]:
                del self._waiting[job_id]

    def release(self) -> None:
        """Nobody waits any longer, now or later: the server is leaving. May be called by a signal's handler."""
        self._released = True

    async def _look(self) -> None:
        while self._waiting:
            await asyncio.sleep(LOOK_EVERY_S)
            if self._released:
                for event in [event for events in self._waiting.values() for event in events]:
                    event.set()
                return
            wanted = list(self._waiting)
            try:
                found = await asyncio.to_thread(self._terminal_of, wanted)
            except SQLAlchemyError as fault:
                log.warning("watch.failed", error=type(fault).__name__)
                continue
            for job_id in found:
                for event in self._waiting.get(job_id, ()):
                    event.set()

    def _terminal_of(self, job_ids: Sequence[uuid.UUID]) -> list[uuid.UUID]:
        found: list[uuid.UUID] = []
        with self._database.read() as transaction:
            for start in range(0, len(job_ids), ASKED_AT_ONCE):
                some = job_ids[start : start + ASKED_AT_ONCE]
                statement = select(Job.id).where(Job.id.in_(some), Job.status.in_(TERMINAL))
                found += transaction.session.scalars(statement)
        return found
