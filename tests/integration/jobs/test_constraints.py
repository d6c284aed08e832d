"""CHECK constraints refuse rows that the transition table does not allow."""

from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from tests.integration.jobs.examples import HOOK, Clock, fetch, job_in, row
from zcore.jobs.database import Database
from zcore.jobs.models import Job, QueueEntry
from zcore.jobs.states import State

NOW = "CURRENT_TIMESTAMP"

INVALID = [
    (State.QUEUED, "jobs", "status = 'dreaming', attempt = 1, stage = 'generate'", "status_known"),
    (State.SUCCEEDED, "jobs", "status = 'running', completed_at = NULL, expires_at = NULL", "status_known"),
    (State.QUEUED, "jobs", "status = 'canceled', attempt = 1, stage = 'generate'", "ended_has_time"),
    (State.QUEUED, "jobs", f"completed_at = {NOW}", "ended_has_time"),
    (State.SUCCEEDED, "jobs", "completed_at = NULL", "ended_has_time"),
    (State.CANCELED, "jobs", "status = 'queued'", "ended_has_time"),
    (State.CANCELED, "jobs", "attempt = NULL", "ended_has_attempt"),
    (State.CANCELED, "jobs", "stage = NULL", "ended_has_attempt"),
    (State.CANCELED, "jobs", "status = 'failed'", "failed_has_error"),
    (State.FAILED, "jobs", "error_code = NULL", "failed_has_error"),
    (State.SUCCEEDED, "jobs", "error_code = 'odd'", "failed_has_error"),
    (State.SUCCEEDED, "jobs", "expires_at = NULL", "outputs_expire"),
    (State.CANCELED, "jobs", f"expires_at = {NOW}", "outputs_expire"),
    (State.EXPIRED, "jobs", "expires_at = NULL", "outputs_expire"),
    (State.SUCCEEDED, "jobs", "stage = 'dream'", "stage_known"),
    (State.CANCELED, "jobs", "embedding_attempt = 1", "embedding_has_attempt"),
    (State.QUEUED, "queue", "status = 'succeeded'", "status_known"),
    (State.QUEUED, "queue", "status = 'running'", "running_has_lease"),
    (State.QUEUED, "queue", f"lease_until = {NOW}", "running_has_lease"),
    (State.RUNNING, "queue", "status = 'queued'", "running_has_lease"),
    (State.RUNNING, "queue", "lease_token = NULL", "running_has_lease"),
    (State.RUNNING, "queue", "lease_until = NULL", "running_has_lease"),
    (State.RUNNING, "queue", "worker = NULL", "running_has_lease"),
    (State.RUNNING, "queue", "scheduled = true", "scheduled_is_queued"),
    (State.QUEUED, "queue", f"cancel_requested_at = {NOW}", "canceled_is_running"),
    (State.QUEUED, "queue", "attempt = -1", "attempts_counted"),
    (State.QUEUED, "queue", "attempts_left = -1", "attempts_counted"),
    (State.QUEUED, "queue", "stage = 'dream'", "stage_known"),
    (State.QUEUED, "queue", "embedding_attempt = 1", "embedding_has_attempt"),
    (State.RUNNING, "queue", "embedding_attempt = 0", "embedding_has_attempt"),
]


def change(database: Database, statement: str, **values: Any) -> None:
    with database.write() as transaction:
        transaction.session.execute(text(statement), values)


@pytest.mark.parametrize(("state", "table", "change_to", "constraint"), INVALID)
def test_a_row_that_no_transition_produces_is_refused(
    database: Database, clock: Clock, state: State, table: str, change_to: str, constraint: str
) -> None:
    before = row(job_in(state, database, clock))
    with pytest.raises(IntegrityError, match=f"ck_{table}_{constraint}"):
        change(database, f"UPDATE {table} SET {change_to}")
    assert row(fetch(database, before["id"])) == before


def test_every_constraint_of_jobs_and_their_queue_is_tested_above() -> None:
    named = {str(one.name) for table in (Job, QueueEntry) for one in table.__table__.constraints}
    checks = {name for name in named if name.startswith("ck_")}
    assert checks == {f"ck_{table}_{constraint}" for _, table, _, constraint in INVALID}


def test_a_delivered_webhook_is_not_due(database: Database, clock: Clock) -> None:
    job_in(State.CANCELED, database, clock, webhook_url=HOOK)
    with pytest.raises(IntegrityError, match="ck_webhook_events_delivered_is_done"):
        change(database, f"UPDATE webhook_events SET delivered_at = {NOW}")
    change(database, f"UPDATE webhook_events SET delivered_at = {NOW}, next_attempt_at = NULL")
