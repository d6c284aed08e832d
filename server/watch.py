"""Waiting for jobs to end: one query at a time serves any number of waiting requests.

Takes the database; `ended` sleeps until a job is terminal or the timeout has passed. Changes nothing: neither the end
of a wait nor a disconnected caller cancels a job.
"""

import asyncio
import uuid
from collections import defaultdict
from collections.abc import Sequence

from zcore.errors import Overloaded
from zcore.jobs import queries
from zcore.jobs.database import Database, DatabaseError
from zcore.telemetry import log

POLL_INTERVAL_S = 0.1


class Watch:
    """Polls for ended jobs ten times a second, only while requests wait."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: defaultdict[uuid.UUID, set[asyncio.Event]] = defaultdict(set)
        self._poller: asyncio.Task[None] | None = None
        self._released = False

    async def ended(self, job_id: uuid.UUID, timeout_s: float) -> None:
        """Return when the job is terminal, or after `timeout_s` seconds."""
        event = asyncio.Event()
        self._waiting[job_id].add(event)
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll())
        try:
            await asyncio.wait_for(event.wait(), timeout_s)
        except TimeoutError:
            pass
        finally:
            self._waiting[job_id].discard(event)
            if not self._waiting[job_id]:
                del self._waiting[job_id]

    def release(self) -> None:
        """End all waits, present and future, because the server is shutting down. Safe to call in a signal handler."""
        self._released = True

    async def _poll(self) -> None:
        while self._waiting:
            await asyncio.sleep(POLL_INTERVAL_S)
            if self._released:
                for event in [event for events in self._waiting.values() for event in events]:
                    event.set()
                return
            job_ids = list(self._waiting)
            try:
                ended = await asyncio.to_thread(self._ended_among, job_ids)
            except (DatabaseError, Overloaded) as error:
                log.warning("watch.failed", error=type(error).__name__)
                continue
            for job_id in ended:
                for event in self._waiting.get(job_id, ()):
                    event.set()

    def _ended_among(self, job_ids: Sequence[uuid.UUID]) -> list[uuid.UUID]:
        with self._database.read() as transaction:
            return queries.ended_among(transaction, job_ids)
