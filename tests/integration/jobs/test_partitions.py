"""On PostgreSQL a week of jobs is a partition: made before it begins, dropped when nothing in it is needed any more."""

import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from sqlalchemy import event, func, select

from tests.integration.jobs.examples import (
    HOOK,
    LEASE_S,
    PERMANENT,
    Clock,
    cancel,
    claim,
    complete,
    events,
    fail,
    fetch,
    job_in,
    submit,
)
from tests.integration.jobs.test_history import AGE_S, DAY_S, WEEK_S, delete_leftovers, deliver_webhooks, rows
from tests.services.postgres import Postgres
from worker.maintenance import tasks
from zcore.errors import NotFound
from zcore.jobs import claims, lifecycle, partitions, queries
from zcore.jobs.database import Database, DatabaseError
from zcore.jobs.models import Job, Table
from zcore.jobs.partitions import Partition
from zcore.jobs.states import State


@pytest.fixture
def record(postgres: Postgres, migrated_template: str, clock: Clock) -> Iterator[Database]:
    """A database of its own, with the partitions of the weeks after its clock's time, a Sunday."""
    with postgres.database(migrated_template) as url, closing(Database(url, clock=clock)) as database:
        tasks.add_partitions(database)
        yield database


def found(database: Database) -> list[Partition]:
    with database.read() as transaction:
        return partitions.find_all(transaction)


def names(database: Database) -> list[str]:
    return [partition.name for partition in found(database)]


def partition_of(database: Database, job_id: uuid.UUID) -> str:
    [name] = [one.name for one in found(database) if is_in(job_id, one)]
    return name


def is_in(job_id: uuid.UUID, partition: Partition) -> bool:
    return (partition.lowest is None or partition.lowest <= job_id) and (
        partition.end is None or job_id < partition.end
    )


def pass_week(database: Database, clock: Clock) -> None:
    """Let a week pass with maintenance."""
    clock.advance(WEEK_S)
    tasks.add_partitions(database)


def forget(database: Database) -> None:
    tasks.forget_old_jobs(database, AGE_S)


def test_the_partitioned_tables_are_those_of_the_models() -> None:
    partitioned = {
        table.name: table.dialect_options["postgresql"]["partition_by"]
        for table in Table.metadata.sorted_tables
        if table.dialect_options["postgresql"]["partition_by"]
    }
    assert partitioned == {table: f"RANGE ({key})" for table, key in partitions.KEYS.items()}


def test_partitions_are_made_two_weeks_ahead_without_gaps(record: Database, clock: Clock) -> None:
    assert names(record)[-4:] == ["20310428", "20310505", "20310512", "last"]
    before = names(record)
    tasks.add_partitions(record)
    assert names(record) == before
    for _ in range(3):
        pass_week(record, clock)
    assert names(record)[-4:] == ["20310519", "20310526", "20310602", "last"]
    bounds = [(one.lowest, one.end) for one in found(record)]
    assert [end for _, end in bounds[:-1]] == [lowest for lowest, _ in bounds[1:]]
    assert (bounds[0][0], bounds[-1][1]) == (None, None)


def test_a_job_is_in_the_partition_of_its_week(record: Database, clock: Clock) -> None:
    sunday = submit(record)
    clock.advance(DAY_S)
    monday = submit(record)
    assert partition_of(record, sunday.id) == "20310428"
    assert partition_of(record, monday.id) == "20310505"
    with record.read() as transaction:
        stored = transaction.session.connection().exec_driver_sql("SELECT id FROM jobs_20310505").scalars().all()
    assert stored == [monday.id]


def test_a_week_is_dropped_when_all_its_jobs_are_over(record: Database, clock: Clock) -> None:
    jobs = [job_in(state, record, clock, webhook_url=HOOK) for state in (State.CANCELED, State.FAILED, State.EXPIRED)]
    deliver_webhooks(record)
    delete_leftovers(record)
    clock.advance(AGE_S - DAY_S)
    tasks.add_partitions(record)
    forget(record)
    assert "20310428" in names(record)
    clock.advance(WEEK_S)
    young = job_in(State.CANCELED, record, clock)
    forget(record)
    assert "20310428" not in names(record)
    for job in jobs:
        with pytest.raises(NotFound):
            fetch(record, job.id)
    assert rows(record) == {"jobs": 1, "job_events": 1, "search_terms": 1}
    assert fetch(record, young.id).status == State.CANCELED


@pytest.mark.parametrize("reason", ["active", "has images", "leftovers", "webhook", "ended lately"])
def test_a_week_stays_for_one_job_and_the_others_are_deleted(record: Database, clock: Clock, reason: str) -> None:
    over = job_in(State.CANCELED, record, clock)
    match reason:
        case "active":
            needed = job_in(State.QUEUED, record, clock)
        case "has images":
            needed = job_in(State.SUCCEEDED, record, clock)
        case "leftovers":
            needed = job_in(State.FAILED, record, clock)
        case "webhook":
            needed = job_in(State.CANCELED, record, clock, webhook_url=HOOK)
        case _:
            needed = job_in(State.CANCELED, record, clock)
    clock.advance(AGE_S + WEEK_S)
    if reason == "ended lately":
        with record.write() as transaction:
            lifecycle.retry(transaction, needed.id, 3)
        cancel(record, needed.id)
    before = events(record, needed.id)
    forget(record)
    assert "20310428" in names(record)
    with pytest.raises(NotFound):
        fetch(record, over.id)
    assert events(record, needed.id) == before


def test_what_there_was_before_the_partitions_is_dropped_at_last(record: Database, clock: Clock) -> None:
    forget(record)
    assert "first" not in names(record)
    assert fetch(record, submit(record).id).status == State.QUEUED


def test_jobs_from_a_time_without_maintenance_get_a_partition(record: Database, clock: Clock) -> None:
    jobs = []
    for _ in range(6):
        jobs.append(job_in(State.CANCELED, record, clock, webhook_url=HOOK))
        clock.advance(WEEK_S)
    assert partition_of(record, jobs[-1].id) == "last"
    tasks.add_partitions(record)
    assert partition_of(record, jobs[-1].id) == "20310519"
    assert names(record)[-2:] == ["20310519", "last"]
    pass_week(record, clock)
    assert names(record)[-3:] == ["20310519", "20310630", "last"]
    assert [fetch(record, job.id).status for job in jobs] == [State.CANCELED] * 6
    assert bound_constraints(record) == 0
    deliver_webhooks(record)
    clock.advance(AGE_S + 4 * WEEK_S)
    forget(record)
    assert rows(record) == {}


def bound_constraints(database: Database) -> int:
    with database.engine.connect() as connection:
        question = f"SELECT count(*) FROM pg_constraint WHERE conname = '{partitions.BOUND}'"
        return int(connection.exec_driver_sql(question).scalar_one())


def test_a_process_killed_halfway_leaves_nothing_that_the_next_one_does_not_end(record: Database, clock: Clock) -> None:
    clock.advance(5 * WEEK_S)
    job = submit(record)
    with record.write() as transaction:
        partitions.add_bound(transaction)
    assert fetch(record, submit(record).id).status == State.QUEUED
    clock.advance(4 * WEEK_S)
    tasks.add_partitions(record)
    assert partition_of(record, job.id) == "20310519"
    assert bound_constraints(record) == 0
    assert fetch(record, submit(record).id).status == State.QUEUED


def test_jobs_of_a_clock_that_was_ahead_stay_in_the_last_partition(record: Database, clock: Clock) -> None:
    clock.advance(10 * WEEK_S)
    ahead = submit(record)
    clock.advance(-5 * WEEK_S)
    with pytest.raises(DatabaseError):
        tasks.add_partitions(record)
    assert bound_constraints(record) == 0
    assert {partition_of(record, ahead.id), partition_of(record, submit(record).id)} == {"last"}


def test_a_transaction_that_reads_for_long_delays_the_partitions_and_no_job(record: Database, clock: Clock) -> None:
    clock.advance(WEEK_S)
    with record.read() as backup:
        backup.session.scalar(select(func.count()).select_from(Job))
        with pytest.raises(DatabaseError, match="lock timeout"):
            tasks.add_partitions(record)
        assert fetch(record, submit(record).id).status == State.QUEUED
    before = names(record)
    tasks.add_partitions(record)
    assert len(names(record)) == len(before) + 1


def test_a_retry_at_the_same_time_keeps_the_week(record: Database, clock: Clock) -> None:
    job = job_in(State.CANCELED, record, clock)
    clock.advance(AGE_S + WEEK_S)
    with record.write() as transaction:
        lifecycle.retry(transaction, job.id, 3)
        with pytest.raises(DatabaseError, match="lock timeout"):
            forget(record)
    forget(record)
    assert fetch(record, job.id).status == State.QUEUED


def test_statements_about_one_job_touch_one_partition(record: Database, clock: Clock) -> None:
    for _ in range(3):
        pass_week(record, clock)
    waiting, other = submit(record, webhook_url=HOOK), submit(record)

    def change(work: Callable[[Any], Any]) -> None:
        with record.write() as transaction:
            work(transaction)

    asked = statements(
        record,
        lambda: complete(record, claim(record)),
        lambda: fail(record, claim(record), PERMANENT),
        lambda: change(lambda transaction: lifecycle.retry(transaction, other.id, 3)),
        lambda: change(lambda transaction: queries.timeline(transaction, waiting.id)),
        lambda: change(lambda transaction: queries.output(transaction, waiting.id, 0)),
        lambda: change(lambda transaction: claims.claim(transaction, "worker-2", LEASE_S)),
        lambda: cancel(record, submit(record).id),
        lambda: fetch(record, waiting.id),
    )
    assert len(asked) > 30
    for statement, parameters in asked:
        read = partitions_in_plan(record, statement, parameters)
        assert read in ([], ["last"], ["20310519"]), statement


def statements(database: Database, *works: Callable[[], Any]) -> list[tuple[str, Any]]:
    """Return the statements of this work, with their parameters."""
    asked: list[tuple[str, Any]] = []

    def remember(_connection: Any, _cursor: Any, executed: str, parameters: Any, *_: Any) -> None:
        if "BEGIN" not in executed and executed.split()[0] in ("SELECT", "INSERT", "UPDATE", "DELETE", "WITH"):
            asked.append((executed, parameters))

    event.listen(database.engine, "before_cursor_execute", remember)
    for work in works:
        work()
    event.remove(database.engine, "before_cursor_execute", remember)
    return asked


def partitions_in_plan(database: Database, statement: str, parameters: Any) -> list[str]:
    """Return the names of the partitions that PostgreSQL would read for a statement."""
    with database.engine.connect() as connection:
        plan = "\n".join(connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).scalars())
    tables = "|".join(partitions.KEYS)
    return sorted(set(re.findall(rf" on (?:{tables})_(first|last|\d{{8}})\b", plan)))
