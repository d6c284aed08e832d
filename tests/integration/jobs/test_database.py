"""One engine from one URL: transactions that hold together, writers that queue up, and a clear word for a wrong URL."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import select, text

from tests.integration.jobs.examples import Clock, all_jobs, look, submit
from tests.services import process
from zcore.errors import ConfigurationError
from zcore.jobs.database import Database
from zcore.jobs.models import Job
from zcore.jobs.states import State


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "is not a SQLAlchemy URL"),
        ("", "is not a SQLAlchemy URL"),
        ("mysql://h/d", "mysql is not supported"),
    ],
)
def test_a_url_of_another_kind_is_refused_by_the_settings_name(url: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^database.url: {said}"):
        Database(url)


@pytest.mark.parametrize("written", ["postgresql", "postgresql+psycopg", "postgresql+asyncpg"])
def test_any_spelling_of_postgresql_uses_the_one_driver(written: str) -> None:
    with closing(Database(f"{written}://anna@127.0.0.1/zimage")) as database:
        assert database.engine.driver == "psycopg"


def test_the_folder_of_an_sqlite_file_is_made(tmp_path: Path) -> None:
    with closing(Database(f"sqlite:///{tmp_path / 'new' / 'zimage.db'}")) as database:
        assert database.is_reachable()


def test_a_database_that_does_not_answer_is_not_reachable(database: Database) -> None:
    assert database.is_reachable()
    with closing(Database(f"postgresql://nobody@127.0.0.1:{process.free_port()}/none")) as absent:
        assert not absent.is_reachable()


def test_times_come_back_in_utc(database: Database, clock: Clock) -> None:
    assert look(database, submit(database).id).created_at.isoformat() == clock.now.isoformat()


def test_a_transaction_has_one_time(each_database_url: str) -> None:
    with closing(Database(each_database_url)) as database, database.write() as transaction:
        first = transaction.now
        transaction.session.execute(select(Job)).all()
        assert transaction.now == first


def test_two_sqlite_writers_that_read_first_queue_up(sqlite: Database) -> None:
    """With a lock taken only at the first write, the second one's snapshot would be too old to write on."""
    job = submit(sqlite)

    def count_up(_: int) -> None:
        with sqlite.write() as transaction:
            row = transaction.session.get_one(Job, job.id)
            row.priority = row.priority + 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count_up, range(40)))
    assert look(sqlite, job.id).priority == 40


def test_an_sqlite_reader_does_not_wait_for_the_writer(sqlite: Database) -> None:
    job = submit(sqlite)
    with sqlite.write() as transaction:
        transaction.session.execute(text("UPDATE jobs SET priority = 9"))
        assert look(sqlite, job.id).priority == 0
    assert look(sqlite, job.id).priority == 9


def test_what_was_committed_survives_a_process_that_does_not_close(sqlite: Database) -> None:
    submit(sqlite)
    path = sqlite.engine.url.database
    assert path is not None
    with closing(sqlite3.connect(path)) as another:
        assert another.execute("SELECT status FROM jobs").fetchall() == [(State.QUEUED,)]
    assert len(all_jobs(sqlite)) == 1
