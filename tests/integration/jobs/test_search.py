"""Search: both databases find the same jobs by words, metadata and ids, however many jobs there are."""

import uuid
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from sqlalchemy import event, text

from tests.integration.jobs.examples import Clock, cancel, job_in, submit
from zcore.jobs import queries, search
from zcore.jobs.database import Database, Transaction
from zcore.jobs.queries import JobFilter, Page
from zcore.jobs.states import State

CORPUS: list[tuple[str, dict[str, Any]]] = [
    ("A red Fox, in deep SNOW", {"customer": "Acme", "order": {"id": 5}}),
    ("100% wool; don't blink", {"tags": ["spring sale", True], "order": {"id": 55}}),
    ("冬の森に狐 and foxgloves, f=1.4", {"customer": "acme & sons"}),
    ("Ein Gemälde: STRASSE bei Nacht \\ 'quoted' \"twice\"", {}),
    ("หมาป่าในหิมะ हिन्दी 🦊🌲", {"note": 'say "hi"\nnow', "empty": ""}),
]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        # words in any order, in any case, by their beginnings
        ("fox", {0, 2}),
        ("SNOW fox", {0}),
        ("foxg", {2}),
        ("ox", set()),
        ("a", {0, 2}),
        ("fox owl", set()),
        ("100", {1}),
        ("wool 100%", {1}),
        ("don't", {1}),
        ("f=1.4", {2}),
        ("strasse", {3}),
        ("straße", {3}),
        ("gemälde", {3}),
        ("हिन्दी", {4}),
        ("🦊", {4}),
        # any part of a text without spaces
        ("の森", {2}),
        ("狐", {2}),
        ("森狐", set()),
        ("ป่าใน", {4}),
        # metadata, by key and value or by the value alone
        ("customer=acme", {0}),
        ("customer=ACME fox", {0}),
        ("customer=acm", set()),
        ("order.id=5", {0}),
        ("acme", {0, 2}),
        ('tags="spring sale"', {1}),
        ("tags=true", {1}),
        ("spring", {1}),
        ("55", {1}),
        ("order.id=6", set()),
        ("customer", set()),
        # what is typed by mistake, or with other search engines in mind
        ("", {0, 1, 2, 3, 4}),
        ("%", set()),
        ("_", set()),
        ("'", set()),
        ('"', set()),
        ("\\", set()),
        ("'quoted' \\", {3}),
        ('"twice', {3}),
        ("fox*", {0, 2}),
        ("fox AND snow", set()),
        ("fox AND foxgloves", {2}),
        ("fox OR owl", set()),
        ("-fox", {0, 2}),
        ("NOT (fox", set()),
        ("terms:fox", set()),
        ("fox & | ! <-> :*", {0, 2}),
        ("=", set()),
        ("=anna", set()),
        ("NEAR(", set()),
        ("^fox", {0, 2}),
        ("x" * 200, set()),
        (" ".join("abcdefghijklmnopqrstuvwxyz" * 4)[:200], set()),
    ],
)
def test_jobs_are_found_by_their_words(database: Database, words: str, found: set[int]) -> None:
    jobs = [submit(database, prompt=prompt, metadata=metadata).id for prompt, metadata in CORPUS]
    assert find(database, text=words) == {jobs[index] for index in found}


def test_a_job_is_found_by_its_own_prompt(database: Database) -> None:
    jobs = {submit(database, prompt=prompt).id: prompt for prompt, _ in CORPUS}
    for job_id, prompt in jobs.items():
        assert find(database, text=prompt) == {job_id}


def test_an_id_or_its_beginning_finds_the_job(database: Database) -> None:
    job, other = submit(database, prompt="a fox"), submit(database, prompt="face 0123456789")
    for named in (str(job.id), f" {str(job.id).upper()} ", job.id.hex, str(job.id)[:30]):
        assert find(database, text=named) == {job.id}
        assert find(database, text=named, owner="ben") == set()
    assert find(database, text=str(job.id)[:8]) == {job.id, other.id}
    assert find(database, text=str(uuid.uuid4())) == set()
    assert find(database, text="0123456789") == {other.id}
    assert find(database, text="0") == {other.id}


def test_a_search_is_combined_with_owner_status_and_time(database: Database, clock: Clock) -> None:
    done = job_in(State.SUCCEEDED, database, clock, prompt="an owl", owner="ben")
    mine = submit(database, prompt="a fox", owner="anna")
    cancel(database, mine.id)
    theirs = submit(database, prompt="a fox", owner="Anna")
    assert find(database, text="fox", owner="anna") == {mine.id}
    assert find(database, text="fox", owner="Anna") == {theirs.id}
    assert find(database, text="fox", owner="ben") == set()
    assert find(database, text="fox", status=State.CANCELED) == {mine.id}
    assert find(database, text="fox", status=State.CANCELED, owner="Anna") == set()
    assert find(database, text="owl", status=State.SUCCEEDED) == {done.id}
    assert find(database, text="fox", created_before=clock.now.replace(year=1999)) == set()


@pytest.mark.parametrize("probed", [2, 5, 1000], ids=["mostly by the index", "by both", "without the index"])
def test_pages_of_a_search_are_complete_in_both_directions(
    database: Database, monkeypatch: pytest.MonkeyPatch, probed: int
) -> None:
    monkeypatch.setattr(search, "PROBED", probed)
    jobs = [submit(database, prompt="a fox" if number % 3 else "an owl").id for number in range(20)]
    foxes = sorted((job for number, job in enumerate(jobs) if number % 3), reverse=True)
    down = [page_of_foxes(database, None)]
    while down[-1].next_cursor:
        down.append(page_of_foxes(database, down[-1].next_cursor))
    up = [down[-1]]
    while up[-1].previous_cursor:
        up.append(page_of_foxes(database, up[-1].previous_cursor, newer=True))
    assert [job.id for page in down for job in page.jobs] == foxes
    assert [job.id for page in up[::-1] for job in page.jobs] == foxes


def page_of_foxes(database: Database, cursor: str | None, *, newer: bool = False) -> Page:
    with database.read() as transaction:
        return queries.page(transaction, JobFilter(text="fox"), cursor, 3, newer=newer)


@pytest.mark.parametrize(
    "wanted",
    [
        JobFilter(text="every"),
        JobFilter(text="rare"),
        JobFilter(text="nowhere"),
        JobFilter(text="every nowhere"),
        JobFilter(text="every", owner="anna"),
        JobFilter(text="nowhere", status=State.QUEUED),
    ],
    ids=lambda wanted: f"{wanted.text}, {wanted.owner or wanted.status}",
)
def test_a_search_reads_a_bounded_number_of_rows(postgresql: Database, wanted: JobFilter) -> None:
    submit(postgresql, owner="anna")
    url = postgresql.engine.url.render_as_string(hide_password=False)
    with (
        closing(Database(url, limits=None)) as unlimited,
        unlimited.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection,
    ):
        connection.execute(text(COPIES), {"count": JOBS})
        connection.execute(text(ENTRIES))
        connection.exec_driver_sql("VACUUM ANALYZE")
    with postgresql.read() as transaction:
        oldest = queries.page(transaction, JobFilter(), None, 1, newer=True).jobs[0]
        for cursor in (None, queries.page(transaction, JobFilter(), None, 200).next_cursor):
            assert rows_read(transaction, wanted, cursor) < 7 * search.PROBED < JOBS
    assert find(postgresql, text="nowhere") == set()
    assert len(find(postgresql, text="rare")) == JOBS // 10_000
    assert oldest.id not in find(postgresql, text="every")


JOBS = 30_000
COPIES = """
INSERT INTO jobs
SELECT (jsonb_populate_record(job, jsonb_build_object('id', uuidv7(make_interval(secs => -number))))).*
FROM jobs AS job, generate_series(1, :count) AS number
"""
ENTRIES = """
INSERT INTO search_terms
SELECT id, array_to_tsvector(ARRAY['every', '@anna', CASE number % 10000 WHEN 9999 THEN 'rare' ELSE 'other' END])
FROM (SELECT id, row_number() OVER (ORDER BY id) AS number FROM jobs) AS job ON CONFLICT DO NOTHING
"""


def rows_read(transaction: Transaction, wanted: JobFilter, cursor: str | None) -> int:
    """Return how many rows of tables and indexes PostgreSQL reads for this page, discarded ones included."""
    executed: list[tuple[str, Any]] = []

    def remember(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        executed.append((statement, parameters))

    connection = transaction.session.connection()
    event.listen(connection, "before_cursor_execute", remember)
    queries.page(transaction, wanted, cursor, 30)
    event.remove(connection, "before_cursor_execute", remember)
    plans = [
        connection.exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters).scalar_one()[0]["Plan"]
        for statement, parameters in executed
    ]
    return sum(
        node["Actual Loops"] * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0))
        for plan in plans
        for node in nodes(plan)
        if "Scan" in node["Node Type"]
    )


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", []):
        yield from nodes(inner)


def find(database: Database, **wanted: Any) -> set[uuid.UUID]:
    """Return the ids of the jobs that pass the filter."""
    with database.read() as transaction:
        return {job.id for job in queries.page(transaction, JobFilter(**wanted), None, 200).jobs}
