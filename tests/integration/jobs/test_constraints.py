"""The tables themselves refuse rows that break the law, whoever writes them."""

import uuid
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from tests.integration.jobs.examples import HOOK, Clock, job_in, look, row, submit
from zcore.jobs.database import Database
from zcore.jobs.models import Job
from zcore.jobs.states import State

NOW = "CURRENT_TIMESTAMP"

UNLAWFUL = [
    (State.QUEUED, "status = 'dreaming'", "status_known"),
    (State.QUEUED, "status = 'running'", "running_has_lease"),
    (State.QUEUED, f"lease_until = {NOW}", "running_has_lease"),
    (State.RUNNING, "status = 'queued'", "running_has_lease"),
    (State.RUNNING, "lease_token = NULL", "running_has_lease"),
    (State.RUNNING, "lease_until = NULL", "running_has_lease"),
    (State.RUNNING, "worker = NULL", "running_has_lease"),
    (State.QUEUED, "status = 'canceled'", "ended_has_time"),
    (State.QUEUED, f"completed_at = {NOW}", "ended_has_time"),
    (State.SUCCEEDED, "completed_at = NULL", "ended_has_time"),
    (State.CANCELED, "status = 'queued'", "ended_has_time"),
    (State.CANCELED, "status = 'failed'", "failed_has_error"),
    (State.FAILED, "error_code = NULL", "failed_has_error"),
    (State.SUCCEEDED, "error_code = 'odd'", "failed_has_error"),
    (State.SUCCEEDED, "expires_at = NULL", "pictures_expire"),
    (State.CANCELED, f"expires_at = {NOW}", "pictures_expire"),
    (State.EXPIRED, "expires_at = NULL", "pictures_expire"),
    (State.QUEUED, "attempt = -1", "attempts_counted"),
    (State.QUEUED, "attempts_left = -1", "attempts_counted"),
    (State.QUEUED, "stage = 'dream'", "stage_known"),
    (State.QUEUED, "embedding_attempt = 1", "embedding_has_attempt"),
    (State.RUNNING, "embedding_attempt = 0", "embedding_has_attempt"),
]


def change(database: Database, statement: str, **values: Any) -> None:
    with database.write() as transaction:
        transaction.session.execute(text(statement), values)


@pytest.mark.parametrize(("state", "change_to", "constraint"), UNLAWFUL)
def test_a_row_that_breaks_the_law_is_refused(
    database: Database, clock: Clock, state: State, change_to: str, constraint: str
) -> None:
    before = row(job_in(state, database, clock))
    with pytest.raises(IntegrityError, match=f"ck_jobs_{constraint}"):
        change(database, f"UPDATE jobs SET {change_to}")
    assert row(look(database, before["id"])) == before


def test_every_constraint_of_the_jobs_table_is_tried_above() -> None:
    named = {str(one.name) for one in Job.__table__.constraints if str(one.name).startswith("ck_")}
    assert named == {f"ck_jobs_{constraint}" for _, _, constraint in UNLAWFUL}


def test_a_delivered_webhook_is_not_due(database: Database, clock: Clock) -> None:
    job_in(State.CANCELED, database, clock, webhook_url=HOOK)
    with pytest.raises(IntegrityError, match="ck_webhook_events_delivered_is_done"):
        change(database, f"UPDATE webhook_events SET delivered_at = {NOW}")
    change(database, f"UPDATE webhook_events SET delivered_at = {NOW}, next_attempt_at = NULL")


def test_one_owner_has_a_key_once(database: Database) -> None:
    submit(database)
    submit(database)
    with pytest.raises(IntegrityError):
        change(database, "UPDATE jobs SET idempotency_key = 'k'")


@pytest.mark.parametrize("table", ["job_events", "job_outputs", "webhook_events"])
def test_nothing_is_recorded_of_a_job_that_is_not_there(database: Database, clock: Clock, table: str) -> None:
    job_in(State.SUCCEEDED, database, clock, webhook_url=HOOK)
    nowhere = uuid.uuid4().hex if database.engine.dialect.name == "sqlite" else uuid.uuid4()
    with pytest.raises(IntegrityError):
        change(database, f"UPDATE {table} SET job_id = :job_id", job_id=nowhere)


def test_a_deleted_job_takes_its_record_along(database: Database, clock: Clock) -> None:
    job_in(State.SUCCEEDED, database, clock, webhook_url=HOOK)
    change(database, "DELETE FROM jobs")
    with database.read() as transaction:
        for table in ("job_events", "job_outputs", "webhook_events"):
            assert transaction.session.scalar(text(f"SELECT count(*) FROM {table}")) == 0
