"""Queries: complete lists without duplicates, queue positions, timelines and counts."""

import re
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event, insert, text

from tests.integration.jobs.examples import (
    HOOK,
    LEASE_S,
    RETENTION_S,
    Clock,
    cancel,
    claim,
    complete,
    job_in,
    row,
    stored_image,
    submit,
)
from zcore.errors import InvalidRequest, NotFound
from zcore.jobs import claims, queries, recovery, uploads
from zcore.jobs.database import Database
from zcore.jobs.models import Job, QueueEntry, WebhookAttempt
from zcore.jobs.queries import JobFilter, Page
from zcore.jobs.states import TERMINAL, State
from zcore.stages import Stage

INDEXES_OF_PARTITIONS = """
SELECT inhrelid::regclass::text, inhparent::regclass::text
FROM pg_inherits JOIN pg_class ON oid = inhrelid WHERE relkind = 'i'
"""
"""The names of the indexes of partitions, and of those of the partitioned tables that they are part of."""
PAGES_AT_MOST = 50  # more pages than any list in these tests has


def ids(database: Database, limit: int = 200, **query: Any) -> list[uuid.UUID]:
    with database.read() as transaction:
        return [job.id for job in queries.page(transaction, JobFilter(**query), None, limit).jobs]


def pages(database: Database, limit: int, query: JobFilter) -> Iterator[list[uuid.UUID]]:
    """Yield page after page, each queried when it is requested."""
    cursor = None
    for _ in range(PAGES_AT_MOST):
        with database.read() as transaction:
            page = queries.page(transaction, query, cursor, limit)
        yield [job.id for job in page.jobs]
        cursor = page.next_cursor
        if cursor is None:
            return
    pytest.fail("the list does not end")


@pytest.mark.parametrize("limit", [1, 4, 7, 12, 13, 200])
def test_pages_are_complete_and_without_duplicates_while_jobs_are_added(database: Database, limit: int) -> None:
    jobs = [submit(database).id for _ in range(12)]
    seen: list[uuid.UUID] = []
    for page in pages(database, limit, JobFilter()):
        seen += page
        submit(database)
    assert seen == jobs[::-1]


@pytest.mark.parametrize("limit", [1, 4, 5, 12])
def test_previous_cursors_lead_back_through_the_same_pages(database: Database, limit: int) -> None:
    for _ in range(13):
        submit(database)
    down: list[Page] = []
    cursor = None
    with database.read() as transaction:
        while (not down or cursor is not None) and len(down) < PAGES_AT_MOST:
            down.append(queries.page(transaction, JobFilter(), cursor, limit))
            cursor = down[-1].next_cursor
        assert down[0].previous_cursor is None
        up = [down[-1]]
        while up[-1].previous_cursor is not None and len(up) < PAGES_AT_MOST:
            up.append(queries.page(transaction, JobFilter(), up[-1].previous_cursor, limit, newer=True))
    assert [[job.id for job in page.jobs] for page in up] == [[job.id for job in page.jobs] for page in down[::-1]]
    assert up[-1].next_cursor == down[0].next_cursor


def test_paging_back_shows_jobs_added_in_the_meantime(database: Database) -> None:
    jobs = [submit(database).id for _ in range(4)]
    with database.read() as transaction:
        first = queries.page(transaction, JobFilter(), None, 2)
        second = queries.page(transaction, JobFilter(), first.next_cursor, 2)
    added = [submit(database).id for _ in range(3)]
    with database.read() as transaction:
        back = queries.page(transaction, JobFilter(), second.previous_cursor, 4, newer=True)
        assert [job.id for job in back.jobs] == [added[1], added[0], jobs[3], jobs[2]]
        newest = queries.page(transaction, JobFilter(), back.previous_cursor, 4, newer=True)
    assert [job.id for job in newest.jobs] == [added[2]]
    assert newest.previous_cursor is None


def test_filtered_pages_are_complete_too(database: Database) -> None:
    mine = [submit(database, owner=("anna", "ben")[index % 2]).id for index in range(14)][::2]
    assert [one for page in pages(database, 3, JobFilter(owner="anna")) for one in page] == mine[::-1]


def test_an_empty_list_is_one_empty_page(database: Database) -> None:
    assert list(pages(database, 5, JobFilter())) == [[]]


@pytest.mark.parametrize("cursor", ["", "x", "not-one", "é", "A" * 21, "A" * 40])
def test_an_invalid_cursor_is_refused(database: Database, cursor: str) -> None:
    with database.read() as transaction, pytest.raises(InvalidRequest, match="cursor"):
        queries.page(transaction, JobFilter(), cursor, 5)


def test_lists_are_filtered_by_owner_and_status(database: Database, clock: Clock) -> None:
    annas = {state: job_in(state, database, clock).id for state in State if state is not State.QUEUED}
    annas[State.QUEUED] = submit(database).id
    bens = submit(database, owner="ben").id
    assert set(ids(database)) == {*annas.values(), bens}
    assert set(ids(database, owner="anna")) == set(annas.values())
    assert ids(database, owner="nobody") == []
    assert {state: ids(database, owner="anna", status=state) for state in State} == {
        state: [job_id] for state, job_id in annas.items()
    }
    assert ids(database, status=State.QUEUED) == [bens, annas[State.QUEUED]]


def test_lists_are_filtered_by_time(database: Database, clock: Clock) -> None:
    earlier = submit(database)
    clock.advance(0.001)
    moment = clock.now
    later = submit(database)
    assert ids(database, created_from=moment) == [later.id]
    assert ids(database, created_before=moment) == [earlier.id]
    assert ids(database, created_from=moment, created_before=moment) == []
    assert ids(database, created_from=moment - timedelta(hours=1)) == [later.id, earlier.id]
    assert ids(database, created_before=datetime(1969, 1, 1, tzinfo=UTC)) == []


def test_the_queue_position_counts_the_jobs_claimed_before(database: Database) -> None:
    jobs = [submit(database, priority=priority) for priority in (0, 0, 5, -5)]
    with database.read() as transaction:
        assert [queries.queue_position(transaction, job) for job in jobs] == [2, 3, 1, 4]
        assert queries.queue_positions(transaction, jobs) == dict(
            zip([job.id for job in jobs], [2, 3, 1, 4], strict=True)
        )
    claim(database)
    with database.read() as transaction:
        running = queries.get(transaction, jobs[2].id)
        assert queries.queue_position(transaction, running) is None
        assert [queries.queue_position(transaction, jobs[index]) for index in (0, 1, 3)] == [1, 2, 3]
        assert queries.queue_positions(transaction, [running, jobs[3]]) == {jobs[3].id: 3}


def test_a_job_is_visible_only_to_its_owner(database: Database) -> None:
    job = submit(database, owner="anna")
    with database.read() as transaction:
        assert queries.get(transaction, job.id, "anna").id == queries.get(transaction, job.id).id == job.id
        with pytest.raises(NotFound):
            queries.get(transaction, job.id, "ben")
        with pytest.raises(NotFound):
            queries.get(transaction, uuid.uuid4())


def test_an_output_is_found_by_its_position(database: Database) -> None:
    job = submit(database, owner="anna", n=2)
    complete(database, claim(database), [stored_image(0), stored_image(1)])
    with database.read() as transaction:
        found, output = queries.output(transaction, job.id, 1, "anna")
        assert (found.id, output.position, output.seed) == (job.id, 1, 8)
        for position, owner in ((2, "anna"), (-1, "anna"), (0, "ben")):
            with pytest.raises(NotFound):
                queries.output(transaction, job.id, position, owner)


def test_a_timeline_contains_only_events_and_deliveries_of_its_job(database: Database, clock: Clock) -> None:
    other = submit(database, webhook_url=HOOK)
    cancel(database, other.id)
    job = submit(database, webhook_url=HOOK, max_attempts=2)
    claim(database)
    clock.advance(LEASE_S + 1)
    with database.write() as transaction:
        recovery.rescue(transaction)
    complete(database, claim(database, "worker-2"))
    with database.read() as transaction:
        [(webhook, _)] = queries.timeline(transaction, job.id).webhooks
    with database.write() as transaction:
        for number, status in ((1, 500), (2, None), (3, 204)):
            attempt = {"number": number, "at": clock.now, "duration_ms": 9, "status_code": status, "response_body": ""}
            key = {"id": number, "job_id": job.id, "event_id": webhook.id}
            transaction.session.add(WebhookAttempt(**key, **attempt))
    with database.read() as transaction:
        timeline = queries.timeline(transaction, job.id)
    assert [(event.type, event.attempt) for event in timeline.events] == [
        ("queued", 0),
        ("claimed", 1),
        ("rescued", 1),
        ("claimed", 2),
        ("succeeded", 2),
    ]
    claimed_by = [event.detail.get("worker") for event in timeline.events if event.type == "claimed"]
    assert claimed_by == ["worker-1", "worker-2"]
    assert [event.at for event in timeline.events] == sorted(event.at for event in timeline.events)
    [(webhook, attempts)] = timeline.webhooks
    assert [attempt.status_code for attempt in attempts] == [500, None, 204]


@pytest.mark.parametrize("unknown", [0, 3 * queries.IDS_PER_QUERY], ids=["few ids", "more ids than a statement takes"])
def test_only_the_ids_of_ended_jobs_are_returned(database: Database, clock: Clock, unknown: int) -> None:
    jobs = {state: job_in(state, database, clock).id for state in State if state is not State.QUEUED}
    jobs[State.QUEUED] = submit(database).id
    asked = [*(uuid.uuid4() for _ in range(unknown)), *jobs.values()]
    with database.read() as transaction:
        assert set(queries.ended_among(transaction, asked)) == {jobs[state] for state in TERMINAL}
        assert queries.ended_among(transaction, []) == []


def test_a_refreshed_job_is_read_again(database: Database, clock: Clock) -> None:
    job = submit(database)
    with database.write() as transaction:
        loaded = queries.get(transaction, job.id)
        transaction.session.execute(text("UPDATE jobs SET priority = 9"))
        assert queries.get(transaction, job.id).priority == 0
        assert queries.get(transaction, job.id, refresh=True).priority == loaded.priority == 9


def test_counts_include_every_state(database: Database, clock: Clock) -> None:
    for state in (State.FAILED, State.FAILED, State.SUCCEEDED, State.CANCELED, State.RUNNING, State.QUEUED):
        job_in(state, database, clock)
    with database.read() as transaction:
        assert queries.counts_by_status(transaction) == {
            State.QUEUED: 1,
            State.RUNNING: 1,
            State.SUCCEEDED: 1,
            State.FAILED: 2,
            State.CANCELED: 1,
            State.EXPIRED: 0,
        }


def fill(database: Database, clock: Clock, count: int) -> None:
    """Insert many ended jobs of many owners, as after a year, and update the statistics."""
    done = row(job_in(State.SUCCEEDED, database, clock))
    owners = [{"owner": f"owner-{number % 50}", "expires_at": clock.now + timedelta(number)} for number in range(count)]
    insert_copies(database, done, owners)


def insert_copies(database: Database, original: dict[str, Any], changes: list[dict[str, Any]]) -> None:
    """Insert a copy of the job, and of its queue entry, for each set of changes, and update the statistics."""
    columns = {name: value for name, value in original.items() if name != "entry"}
    with database.write() as transaction:
        jobs = [columns | {"id": transaction.new_id()} | change for change in changes]
        transaction.session.execute(insert(Job), jobs)
        if original["entry"]["job_id"] is not None:
            entries = [original["entry"] | {"job_id": job["id"], "position": job["id"]} for job in jobs]
            transaction.session.execute(insert(QueueEntry), entries)
    with database.write() as transaction:
        transaction.session.execute(text("ANALYZE"))


def plan(database: Database, ask: Any, statement: str = "") -> str:
    """Return the database's plan for the first query that `ask` makes and that contains `statement`."""
    asked: list[tuple[str, Any]] = []

    def remember(_connection: Any, _cursor: Any, executed: str, parameters: Any, *_: Any) -> None:
        if "BEGIN" not in executed and statement in executed:
            asked.append((executed, parameters))

    event.listen(database.engine, "before_cursor_execute", remember)
    with database.write() as transaction:
        ask(transaction)
    event.remove(database.engine, "before_cursor_execute", remember)
    query, parameters = asked[0]
    explain = "EXPLAIN" if database.engine.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN"
    with database.engine.connect() as connection:
        found = "\n".join(str(line[-1]) for line in connection.exec_driver_sql(f"{explain} {query}", parameters))
        if database.engine.dialect.name == "postgresql":
            for part, whole in connection.exec_driver_sql(INDEXES_OF_PARTITIONS):
                found = re.sub(rf"\b{part}\b", whole, found)
    return found


def test_frequent_queries_use_an_index_without_sorting(database: Database, clock: Clock) -> None:
    fill(database, clock, 3000)
    insert_copies(database, row(submit(database)), [{}] * 1000)
    clock.advance(timedelta(days=30).total_seconds())  # the images of thirty jobs are to be deleted
    questions: list[tuple[str, Any]] = [
        ("ix_queue_ready", lambda transaction: claims.claim(transaction, "gpu-1", LEASE_S, [Stage.GENERATE])),
        ("ix_queue_ready", lambda transaction: claims.claim(transaction, "cpu-1", LEASE_S, [Stage.ENCODE])),
        ("ix_queue_scheduled", claims.promote),
        ("ix_queue_running", recovery.rescue),
        ("ix_jobs_expiry", lambda transaction: queries.past_retention(transaction, 10)),
        ("ix_jobs_owner_id", lambda transaction: queries.page(transaction, JobFilter(owner="owner-7"), None, 10)),
        (
            "ix_jobs_status_id",
            lambda transaction: queries.page(transaction, JobFilter(status=State.SUCCEEDED), None, 10),
        ),
    ]
    for index, ask in questions:
        found = plan(database, ask)
        assert re.search(index, found)
        assert "Sort  (" not in found
        assert "temp b-tree" not in found.lower()


def test_finding_unused_uploads_does_not_scan_ended_jobs(database: Database, clock: Clock) -> None:
    fill(database, clock, 3000)
    with database.write() as transaction:
        uploads.record(transaction, "anna", uploads.UploadedImage("a" * 64, "png", 64, 48, 1234))
    clock.advance(3600)
    found = plan(database, lambda transaction: uploads.expire(transaction, 10), statement="UNION")
    assert not re.search("Seq Scan on jobs_last|SCAN jobs$", found, re.MULTILINE)  # the other partitions are empty


def test_a_claim_at_one_stage_does_not_scan_the_queue_of_the_other(database: Database) -> None:
    submit(database, priority=-1)
    insert_copies(database, row(submit(database, stage=Stage.ENCODE)), [{}] * 3000)
    questions: list[Any] = [
        lambda transaction: claims.claim(transaction, "gpu-1", LEASE_S, [Stage.GENERATE]),
    ]
    for ask in questions:
        found = plan(database, ask)
        assert "ix_queue_ready" in found
        assert "temp b-tree" not in found.lower()


def test_a_read_transaction_does_not_commit(database: Database, clock: Clock) -> None:
    job_in(State.SUCCEEDED, database, clock)
    clock.advance(RETENTION_S)
    with database.read() as transaction:
        queries.past_retention(transaction, 5)[0].stored_status = State.EXPIRED
    assert ids(database, status=State.EXPIRED) == []
