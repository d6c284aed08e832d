"""What a run has left in the database and among the objects, as facts."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from uuid import UUID

from tests.chaos.callers import Journal
from tests.chaos.facts import Delivery, Facts, JobRow, OutputRow, Sample, Seen
from tests.chaos.stores import UNAVAILABLE, Store
from zcore.jobs.states import TERMINAL

ENDED = ", ".join(f"'{state}'" for state in sorted(TERMINAL))


def unended(store: Store) -> int:
    """Return the number of jobs that have not ended."""
    return int(store.rows(f"SELECT count(*) FROM jobs WHERE status NOT IN ({ENDED})")[0][0])


def undelivered(store: Store) -> int:
    """Return the number of webhook events that are still to be delivered."""
    return int(store.rows("SELECT count(*) FROM webhook_events WHERE delivered_at IS NULL")[0][0])


def hurry_deletions(store: Store) -> None:
    """Let the time pass after which maintenance deletes what lost attempts may have stored."""
    for table in ("leftovers", "leftover_objects"):
        with suppress(*UNAVAILABLE):  # an older schema has no such table
            store.execute(f"UPDATE {table} SET due_at = '2000-01-01 00:00:00.000000'")


def named_keys(store: Store) -> set[str]:
    """Return the keys of the objects that the database names."""
    return {str(key) for (key,) in store.rows("SELECT key FROM job_outputs")} | _upload_keys(store)


def read_facts(
    store: Store, journal: Journal, seen: Sequence[Seen], samples: Sequence[Sample], deliveries: Sequence[Delivery]
) -> Facts:
    """Read everything that the observer judges."""
    return Facts(
        accepted=tuple(journal.accepted),
        jobs=_jobs(store),
        cancellations=frozenset(journal.cancellations),
        events=_grouped(store, "SELECT job_id, type FROM job_events ORDER BY id"),
        outputs=_outputs(store),
        objects=_hashes(store),
        uploads=frozenset(_upload_keys(store)),
        downloads=tuple(journal.downloads),
        webhook_ids=_webhook_ids(store),
        deliveries=tuple(deliveries),
        answers=tuple(journal.answers),
        # Each reader has its own order: what one saw says nothing about when the other saw it.
        seen=(*journal.seen, *seen),
        samples=tuple(samples),
    )


def _jobs(store: Store) -> dict[str, JobRow]:
    rows = store.rows("SELECT id, status, error_code FROM jobs")
    return {text_of(job_id): JobRow(*rest) for job_id, *rest in rows}


def _grouped(store: Store, query: str) -> dict[str, list[str]]:
    found = defaultdict[str, list[str]](list)
    for job_id, value in store.rows(query):
        found[text_of(job_id)].append(str(value))
    return dict(found)


def _webhook_ids(store: Store) -> dict[str, list[str]]:
    found = _grouped(store, "SELECT job_id, id FROM webhook_events")
    return {job_id: [text_of(webhook_id) for webhook_id in ids] for job_id, ids in found.items()}


def _outputs(store: Store) -> dict[str, list[OutputRow]]:
    found = defaultdict[str, list[OutputRow]](list)
    for job_id, *rest in store.rows("SELECT job_id, position, key, sha256 FROM job_outputs"):
        found[text_of(job_id)].append(OutputRow(*rest))
    return dict(found)


def _upload_keys(store: Store) -> set[str]:
    return {str(key) for (key,) in store.rows("SELECT storage_key FROM inputs WHERE stored_at IS NOT NULL")}


def _hashes(store: Store) -> dict[str, str]:
    def sha256(key: str) -> str:
        return hashlib.sha256(store.content(key)).hexdigest()

    keys = sorted(store.keys())
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(keys, pool.map(sha256, keys), strict=True))


def text_of(identifier: object) -> str:
    """Return an id as the API writes it; SQLite has it without dashes."""
    return str(UUID(str(identifier)))
