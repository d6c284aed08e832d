"""Sweep: compares the objects in storage with the rows that they belong to, a page of keys at a time.

Objects that are old and belong to no row are deleted, although nothing should leave any: what a worker stored after its
job had ended, what could not be deleted during an outage, what a killed process left. Rows whose object is missing are
reported in the log. Objects of others in the same bucket are not touched.
"""

from collections.abc import Sequence
from datetime import timedelta

from worker.maintenance.leadership import Leadership
from zcore.errors import StorageError
from zcore.jobs import sweeps
from zcore.jobs.database import Database
from zcore.storage import Storage, StoredObject
from zcore.telemetry import log

KEYS_PER_PAGE = 500
PAUSE_S = 5.0
"""Time from one page to the next; a million objects are compared in three hours."""
ROUND_PAUSE_S = 3600.0
"""Time from the last page of a round to the first one of the next, and until a refused listing is tried again."""


class StorageSweep:
    """Goes on with the sweep that is due, one page at a time."""

    def __init__(self, database: Database, storage: Storage, min_age_s: float, leadership: Leadership) -> None:
        """Objects that are younger than `min_age_s` seconds are left alone."""
        self._database = database
        self._storage = storage
        self._min_age_s = min_age_s
        self._leadership = leadership
        self._is_refused = False

    def run(self) -> None:
        """Compare the next page. Raises `StorageError` and `DatabaseError`."""
        with self._database.read() as transaction:
            sweep = sweeps.next_due(transaction)
            old_before = transaction.now - timedelta(seconds=self._min_age_s)
        if sweep is None:
            return
        page = self._storage.list_objects(sweep.prefix, sweep.after, KEYS_PER_PAGE)
        self._note_permission(granted=page is not None)
        if page is None:
            self._go_on(sweep.prefix, sweep.after, ROUND_PAUSE_S)
            return
        until = page.next_after
        with self._database.read() as transaction:
            old = [stored for stored in page.objects if stored.modified_at < old_before]
            drafts = [stored.key for stored in old if stored.is_draft]
            lost = sweeps.unowned(transaction, [stored.key for stored in old if not stored.is_draft])
            expected = sweeps.expected(transaction, sweep.prefix, sweep.after, until)
        self._delete(sweep.prefix, drafts + lost)
        self._report_missing(expected, page.objects)
        self._go_on(sweep.prefix, until or "", ROUND_PAUSE_S if until is None else PAUSE_S)

    def _note_permission(self, *, granted: bool) -> None:
        """Report it once if the store begins to refuse a listing."""
        if not (granted or self._is_refused):
            log.warning("sweep.not_permitted", hint="without the right to list the bucket, lost objects stay in it")
        self._is_refused = not granted

    def _go_on(self, prefix: str, after: str, pause_s: float) -> None:
        with self._database.write() as transaction:
            sweeps.go_on(transaction, prefix, after, pause_s)

    def _delete(self, prefix: str, keys: list[str]) -> None:
        deleted = 0
        for key in keys:
            if not self._leadership.is_held:
                break
            try:
                self._storage.delete([key])
                deleted += 1
            except StorageError as fault:
                log.warning("sweep.deletion_failed", key=key, error=fault.message)
        if deleted:
            log.warning("sweep.deleted", prefix=prefix, count=deleted)

    def _report_missing(self, expected: list[str], page: Sequence[StoredObject]) -> None:
        """Report the objects that rows expect and storage does not have, even if it is asked for each alone."""
        listed = {stored.key for stored in page}
        for key in expected:
            if key not in listed and self._leadership.is_held and self._is_missing(key):
                log.error("sweep.object_missing", key=key)

    def _is_missing(self, key: str) -> bool:
        try:
            return not self._storage.exists(key)
        except StorageError as fault:
            log.warning("sweep.read_failed", key=key, error=fault.message)
            return False
