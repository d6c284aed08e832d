"""Answers of the record: lists that lose and repeat nothing, places in the queue, timelines, counts."""

import re
import time
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
    picture,
    row,
    submit,
)
from tests.waiting import wait_until
from zcore.errors import InvalidRequest, NotFound
from zcore.jobs import inputs, lifecycle, queries
from zcore.jobs.database import Database
from zcore.jobs.models import Job, WebhookAttempt
from zcore.jobs.queries import JobFilter, Page
from zcore.jobs.states import State
from zcore.stages import Stage

PAGES_AT_MOST = 50  # a list of so few jobs has ended long before


def ids(database: Database, limit: int = 200, **wanted: Any) -> list[uuid.UUID]:
    with database.read() as transaction:
        return [job.id for job in queries.page(transaction, JobFilter(**wanted), None, limit).jobs]


def pages(database: Database, limit: int, wanted: JobFilter) -> Iterator[list[uuid.UUID]]:
    """Page after page, each asked for when it is wanted."""
    cursor = None
    for _ in range(PAGES_AT_MOST):
        with database.read() as transaction:
            page = queries.page(transaction, wanted, cursor, limit)
        yield [job.id for job in page.jobs]
        cursor = page.next_cursor
        if cursor is None:
            return
    pytest.fail("the list does not end")


@pytest.mark.parametrize("limit", [1, 4, 7, 12, 13, 200])
def test_pages_are_complete_and_without_doubles_while_jobs_are_added(database: Database, limit: int) -> None:
    jobs = [submit(database).id for _ in range(12)]
    seen: list[uuid.UUID] = []
    for page in pages(database, limit, JobFilter()):
        seen += page
        submit(database)
    assert seen == jobs[::-1]


@pytest.mark.parametrize("limit", [1, 4, 5, 12])
def test_pages_lead_back_to_where_they_came_from(database: Database, limit: int) -> None:
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


def test_going_back_shows_what_was_added_meanwhile(database: Database) -> None:
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
def test_a_made_up_cursor_is_refused(database: Database, cursor: str) -> None:
    with database.read() as transaction, pytest.raises(InvalidRequest, match="cursor"):
        queries.page(transaction, JobFilter(), cursor, 5)


def test_lists_show_one_owner_one_state_or_both(database: Database, clock: Clock) -> None:
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


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("fox", [3, 0]),
        ("FOX", [3, 0]),
        ("100%", [1]),
        ("%", [1]),
        ("a_b", [2]),
        ("_", [2]),
        ("\\", [3]),
        ("owl", []),
        ("", [3, 2, 1, 0]),
    ],
)
def test_text_is_looked_for_in_prompts_as_they_are_written(database: Database, words: str, found: list[int]) -> None:
    prompts = ["a Fox", "100% wool", "a_b", "fox\\hen"]
    jobs = [submit(database, prompt=prompt).id for prompt in prompts]
    assert ids(database, text=words) == [jobs[index] for index in found]


def test_a_whole_id_finds_its_job(database: Database) -> None:
    job, _ = submit(database), submit(database)
    assert ids(database, text=str(job.id)) == [job.id]
    assert ids(database, text=f" {job.id} ") == [job.id]
    assert ids(database, text=str(uuid.uuid4())) == []


def test_lists_are_cut_by_time(database: Database) -> None:
    earlier = submit(database)
    moment = next_millisecond(earlier)
    later = submit(database)
    assert ids(database, created_from=moment) == [later.id]
    assert ids(database, created_before=moment) == [earlier.id]
    assert ids(database, created_from=moment, created_before=moment) == []
    assert ids(database, created_from=moment - timedelta(hours=1)) == [later.id, earlier.id]
    assert ids(database, created_before=datetime(1969, 1, 1, tzinfo=UTC)) == []


def next_millisecond(job: Job) -> datetime:
    """The first one after the job's, when it has begun."""
    after_ms = (job.id.int >> 80) + 1
    wait_until(lambda: time.time_ns() // 1_000_000 >= after_ms, every_s=0.0005)
    return datetime.fromtimestamp(after_ms / 1000, UTC)


def test_a_place_in_the_queue_counts_those_that_are_claimed_before(database: Database) -> None:
    jobs = [submit(database, priority=priority) for priority in (0, 0, 5, -5)]
    with database.read() as transaction:
        assert [queries.queue_position(transaction, job) for job in jobs] == [2, 3, 1, 4]
    claim(database)
    with database.read() as transaction:
        running = queries.get(transaction, jobs[2].id)
        assert queries.queue_position(transaction, running) is None
        assert [queries.queue_position(transaction, jobs[index]) for index in (0, 1, 3)] == [1, 2, 3]


def test_a_job_is_shown_to_its_owner_and_to_nobody_else(database: Database) -> None:
    job = submit(database, owner="anna")
    with database.read() as transaction:
        assert queries.get(transaction, job.id, "anna").id == queries.get(transaction, job.id).id == job.id
        with pytest.raises(NotFound):
            queries.get(transaction, job.id, "ben")
        with pytest.raises(NotFound):
            queries.get(transaction, uuid.uuid4())


def test_one_picture_is_found_by_its_number(database: Database) -> None:
    job = submit(database, owner="anna", n=2)
    complete(database, claim(database), [picture(0), picture(1)])
    with database.read() as transaction:
        found, output = queries.output(transaction, job.id, 1, "anna")
        assert (found.id, output.position, output.seed) == (job.id, 1, 8)
        for position, owner in ((2, "anna"), (-1, "anna"), (0, "ben")):
            with pytest.raises(NotFound):
                queries.output(transaction, job.id, position, owner)


def test_a_timeline_tells_events_and_deliveries_of_its_job_alone(database: Database, clock: Clock) -> None:
    other = submit(database, webhook_url=HOOK)
    cancel(database, other.id)
    job = submit(database, webhook_url=HOOK, max_attempts=2)
    claim(database)
    clock.advance(LEASE_S + 1)
    with database.write() as transaction:
        lifecycle.rescue(transaction)
    complete(database, claim(database, "worker-2"))
    with database.read() as transaction:
        [(webhook, _)] = queries.timeline(transaction, job.id).webhooks
    with database.write() as transaction:
        for number, status in ((1, 500), (2, None), (3, 204)):
            transaction.session.add(
                WebhookAttempt(
                    event_id=webhook.id, number=number, at=clock.now, duration_ms=9, status_code=status, answer=""
                )
            )
    with database.read() as transaction:
        told = queries.timeline(transaction, job.id)
    assert [(event.type, event.attempt) for event in told.events] == [
        ("queued", 0),
        ("claimed", 1),
        ("rescued", 1),
        ("claimed", 2),
        ("succeeded", 2),
    ]
    assert [event.detail.get("worker") for event in told.events if event.type == "claimed"] == ["worker-1", "worker-2"]
    assert [event.at for event in told.events] == sorted(event.at for event in told.events)
    [(webhook, tries)] = told.webhooks
    assert [attempt.status_code for attempt in tries] == [500, None, 204]


def test_counts_name_every_state(database: Database, clock: Clock) -> None:
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
    """Many ended jobs of many owners, as after a year, and the statistics of them."""
    done = row(job_in(State.SUCCEEDED, database, clock))
    owners = [{"owner": f"owner-{number % 50}", "expires_at": clock.now + timedelta(number)} for number in range(count)]
    copy(database, done, owners)


def copy(database: Database, original: dict[str, Any], changes: list[dict[str, Any]]) -> None:
    """As many rows as there are changes to one, and the statistics of them."""
    with database.write() as transaction:
        transaction.session.execute(insert(Job), [original | {"id": lifecycle.new_id()} | change for change in changes])
    with database.write() as transaction:
        transaction.session.execute(text("ANALYZE"))


def plan(database: Database, ask: Any) -> str:
    """How the database looks for what `ask` looks for first, in its own words."""
    asked: list[tuple[str, Any]] = []

    def remember(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "jobs" in statement:
            asked.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", remember)
    with database.write() as transaction:
        ask(transaction)
    event.remove(database.engine, "before_cursor_execute", remember)
    statement, parameters = asked[0]
    explain = "EXPLAIN" if database.engine.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN"
    with database.engine.connect() as connection:
        return "\n".join(str(line[-1]) for line in connection.exec_driver_sql(f"{explain} {statement}", parameters))


def test_what_is_asked_all_day_is_answered_by_an_index_without_sorting(database: Database, clock: Clock) -> None:
    fill(database, clock, 3000)
    few_run = r"ix_jobs_(lease|status_id)"  # either finds them, and they are as few as there are workers
    questions: list[tuple[str, Any]] = [
        ("ix_jobs_queue", lambda transaction: lifecycle.claim(transaction, "worker-1", LEASE_S)),
        (r"ix_jobs_(stage_)?queue", lambda transaction: lifecycle.claim(transaction, "cpu-1", LEASE_S, [Stage.ENCODE])),
        (r"ix_jobs_(stage_)?queue", lambda transaction: lifecycle.mark_announced(transaction, Stage.ENCODE, 10, 10)),
        ("ix_jobs_embedding", lambda transaction: queries.ended_with_embedding(transaction, 10)),
        (few_run, lifecycle.rescue),
        ("ix_jobs_expiry", lambda transaction: queries.past_retention(transaction, 10)),
        ("ix_jobs_owner_id", lambda transaction: queries.page(transaction, JobFilter(owner="owner-7"), None, 10)),
        ("ix_jobs_status_id", lambda transaction: queries.page(transaction, JobFilter(status=State.FAILED), None, 10)),
    ]
    for index, ask in questions:
        found = plan(database, ask)
        assert re.search(index, found)
        assert "sort" not in found.lower()
        assert "temp b-tree" not in found.lower()


def test_a_year_of_ended_jobs_is_not_read_through_to_see_which_uploads_are_in_use(
    database: Database, clock: Clock
) -> None:
    fill(database, clock, 3000)
    found = plan(database, lambda transaction: inputs.past_retention(transaction, 10))
    assert re.search("ix_jobs_(status_id|queue|lease)", found)
    assert not re.search("Seq Scan on jobs|SCAN jobs$", found, re.MULTILINE)


def test_a_long_queue_at_one_stage_is_not_read_through_by_workers_of_the_other(database: Database) -> None:
    submit(database, priority=-1)
    copy(database, row(submit(database, stage=Stage.ENCODE)), [{}] * 3000)
    questions: list[Any] = [
        lambda transaction: lifecycle.claim(transaction, "gpu-1", LEASE_S, [Stage.GENERATE]),
        lambda transaction: lifecycle.mark_announced(transaction, Stage.GENERATE, 10, 10),
    ]
    for ask in questions:
        found = plan(database, ask)
        assert "ix_jobs_stage_queue" in found
        assert "temp b-tree" not in found.lower()


def test_reading_leaves_no_trace(database: Database, clock: Clock) -> None:
    job_in(State.SUCCEEDED, database, clock)
    clock.advance(RETENTION_S)
    with database.read() as transaction:
        queries.past_retention(transaction, 5)[0].status = State.EXPIRED
    assert ids(database, status=State.EXPIRED) == []
