"""The migrations preserve every row of an installation of revision 0008, there and back."""

import json
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from alembic import command

from tests.history import COLUMNS, History
from tests.integration.jobs.test_migrations import settings_of_alembic
from tests.services.postgres import Postgres
from zcore.jobs import queries
from zcore.jobs.database import Database
from zcore.jobs.models import NULLABLE_FIELDS
from zcore.jobs.states import TERMINAL

JOBS = 300
ORDER = {
    "jobs": "id",
    "job_outputs": "job_id, position",
    "job_events": "job_id, id",
    "webhook_events": "id",
    "webhook_attempts": "event_id, number",
}
DOCUMENTS = ("request", "caller_metadata", "metrics", "engine", "detail", "snapshot")
NUMBERED = ("job_events", "webhook_attempts")
"""Tables whose `id` only numbers the rows."""
FACTS = (
    "owner", "status", "priority", "caller_metadata", "webhook_url", "created_at", "completed_at", "expires_at",
    "error_code", "error_message", "error_retryable", "metrics", "engine", "attempt", "worker", "started_at", "stage",
    "embedding_attempt", "lease_token", "lease_until", "cancel_requested_at",
)  # fmt: skip
FACTS_WHILE_ACTIVE = (
    "attempts_left", "available_at", "notified_at", "progress_phase", "progress_step", "progress_steps",
)  # fmt: skip
Row = dict[str, Any]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path, postgres: Postgres) -> Iterator[str]:
    """A database of revision 0008 with jobs in every state."""
    with postgres.database() as empty:
        chosen = empty if request.param == "postgresql" else f"sqlite:///{tmp_path / 'zimage.db'}"
        command.upgrade(settings_of_alembic(chosen), "0008")
        History(JOBS, active_one_in=20).fill(chosen)
        yield chosen


def rows(database: Database, table: str) -> list[Row]:
    """Return the rows of a table of revision 0008 in their order."""
    with database.engine.connect() as connection:
        found = connection.exec_driver_sql(f"SELECT * FROM {table} ORDER BY {ORDER[table]}").mappings().all()
    omitted = ("id",) if table in NUMBERED else ()
    return [{name: parsed(name, value) for name, value in row.items() if name not in omitted} for row in found]


def parsed(name: str, value: Any) -> Any:
    """Return a value of SQLite, which has it as text, as PostgreSQL would."""
    if not isinstance(value, str):
        return value
    if name in DOCUMENTS:
        return json.loads(value)
    if name in ("id", "job_id", "event_id", "lease_token"):
        return UUID(value)
    is_time = name == "at" or name.endswith(("_at", "_until"))
    return datetime.fromisoformat(value).replace(tzinfo=UTC) if is_time else value


def without_what_is_forgotten(job: Row) -> Row:
    """Return a job of revision 0008 as it comes back: an ended one without its place in the queue.

    The hash of its body is forgotten too, unless an Idempotency-Key needs it.
    """
    changed: Row = {} if job["idempotency_key"] else {"fingerprint": ""}
    if job["status"] in TERMINAL:
        changed |= {"attempts_left": 0, "progress_step": 0, "progress_steps": 0, "notified_at": None}
        changed["available_at"] = job["created_at"]
    return job | changed


def test_every_row_comes_back(url: str) -> None:
    with closing(Database(url)) as database:
        before = {table: rows(database, table) for table in COLUMNS}
        assert {job["status"] for job in before["jobs"]} == {"queued", "running", *TERMINAL}
        assert all(before.values())
        command.upgrade(settings_of_alembic(url), "head")
        command.downgrade(settings_of_alembic(url), "0008")
        after = {table: rows(database, table) for table in COLUMNS}
    assert after == before | {"jobs": [without_what_is_forgotten(job) for job in before["jobs"]]}


def test_every_job_is_read_as_it_was(url: str) -> None:
    with closing(Database(url)) as database:
        before = {table: rows(database, table) for table in COLUMNS}
        command.upgrade(settings_of_alembic(url), "head")
        with database.read() as transaction:
            for row in before["jobs"]:
                job, timeline = queries.get(transaction, row["id"]), queries.timeline(transaction, row["id"])
                hooks = {hook.id for hook, _ in timeline.webhooks}
                names = FACTS if row["status"] in TERMINAL else FACTS + FACTS_WHILE_ACTIVE
                assert {name: getattr(job, name) for name in names} == {name: row[name] for name in names}
                assert job.request == dict.fromkeys(NULLABLE_FIELDS) | row["request"]
                parts = {
                    "job_outputs": job.outputs,
                    "job_events": timeline.events,
                    "webhook_events": [hook for hook, _ in timeline.webhooks],
                    "webhook_attempts": [attempt for _, attempts in timeline.webhooks for attempt in attempts],
                }
                for table, found in parts.items():
                    key, keys = ("event_id", hooks) if table == "webhook_attempts" else ("job_id", {row["id"]})
                    expected = [one for one in before[table] if one[key] in keys]
                    pairs = zip(found, expected, strict=True)
                    assert [{name: getattr(one, name) for name in columns} for one, columns in pairs] == expected
