"""One engine from one URL: atomic transactions, writers that wait for each other, errors for unsupported URLs."""

import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import make_url, select, text
from sqlalchemy.exc import InvalidRequestError

from tests.integration.jobs.examples import Clock, all_jobs, fetch, submit
from tests.services import process
from tests.services.postgres import Postgres
from zcore.errors import ConfigurationError
from zcore.jobs.database import Database, DatabaseError, newest_revision, temporary_fault
from zcore.jobs.models import Job
from zcore.jobs.states import State

TREE = Path(__file__).resolve().parents[3]
END_OTHERS = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
"""


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "must be a SQLAlchemy URL"),
        ("", "must be a SQLAlchemy URL"),
        ("mysql://h/d", "must be a sqlite or postgresql URL, not mysql"),
    ],
)
def test_an_unsupported_url_is_refused_with_the_name_of_the_setting(url: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^database.url: {message}"):
        Database(url)


@pytest.mark.parametrize("written", ["postgresql", "postgresql+psycopg", "postgresql+asyncpg"])
def test_every_postgresql_url_uses_psycopg(written: str) -> None:
    with closing(Database(f"{written}://anna@127.0.0.1/zimage")) as database:
        assert database.engine.driver == "psycopg"


def test_the_folder_of_an_sqlite_file_is_created(tmp_path: Path) -> None:
    with closing(Database(f"sqlite:///{tmp_path / 'new' / 'zimage.db'}")) as database, database.write():
        assert (tmp_path / "new" / "zimage.db").exists()


def test_a_migrated_database_is_ready(database: Database) -> None:
    assert database.unready_reason() is None


def test_a_database_that_does_not_answer_is_not_ready() -> None:
    with closing(Database(f"postgresql://user@127.0.0.1:{process.free_port()}/none")) as absent:
        reason = absent.unready_reason()
    assert reason is not None
    assert reason.startswith("the database does not answer: ")


def test_an_empty_database_is_not_ready(postgres: Postgres, tmp_path: Path) -> None:
    with postgres.database() as empty:
        for url in (empty, f"sqlite:///{tmp_path / 'empty.db'}"):
            with closing(Database(url)) as database:
                assert "run `alembic upgrade head`" in (database.unready_reason() or "")


@pytest.mark.parametrize(("revision", "is_ready"), [("0001", False), ("9999", True)])
def test_only_tables_of_an_older_version_are_not_ready(each_database_url: str, revision: str, is_ready: bool) -> None:
    with closing(Database(each_database_url)) as database:
        with database.write() as transaction:
            transaction.session.execute(text("UPDATE alembic_version SET version_num = :is"), {"is": revision})
        reason = database.unready_reason()
    assert (reason is None) == is_ready
    assert is_ready or f"revision 0001 instead of {newest_revision()}" in str(reason)


def test_a_file_that_cannot_be_written_is_not_ready(sqlite_url: str) -> None:
    path = sqlite_url.removeprefix("sqlite:///")
    with closing(Database(sqlite_url)) as writer:
        submit(writer)  # the log exists from now on
        with closing(Database(f"sqlite:///file:{path}?mode=ro&uri=true")) as database:
            assert str(database.unready_reason()).startswith("the database file is read-only")


LIMITED = """
import resource, sys
from zcore.jobs.database import Database
database = Database(sys.argv[1])
assert database.unready_reason() is None
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
print(database.unready_reason())
"""


def test_a_file_that_cannot_grow_is_not_ready(sqlite_url: str) -> None:
    """A limit of the process stands for a full disk: both refuse a write, and allow reads."""
    command = [sys.executable, "-c", LIMITED, sqlite_url]
    answer = subprocess.run(command, cwd=TREE, capture_output=True, text=True, timeout=120, check=False)
    assert answer.stdout.startswith("the disk of the database file"), answer.stderr


def test_the_newest_revision_is_that_of_the_migrations() -> None:
    assert newest_revision() == ScriptDirectory(str(TREE / "migrations")).get_current_head()


def test_a_database_that_becomes_read_only_is_not_ready_until_it_can_be_written(database_url: str) -> None:
    """As after a failover: the address leads to a standby for a while, and connections to it must be discarded."""
    name = make_url(database_url).database
    with closing(Database(database_url)) as database, closing(Database(database_url)) as administrator:
        submit(database)
        _execute(administrator, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        _execute(administrator, END_OTHERS)
        with database.read():  # the pool now has a connection that stays read-only
            pass
        assert database.unready_reason() == (
            "the database is read-only: cannot execute UPDATE in a read-only transaction"
        )
        with pytest.raises(DatabaseError) as refused:
            submit(database)
        assert temporary_fault(refused.value) == "the database is read-only"
        _execute(administrator, f"ALTER DATABASE {name} RESET default_transaction_read_only")
        submit(database)
        assert database.unready_reason() is None


@pytest.mark.parametrize(
    ("statement", "fault"),
    [
        ("SELECT * FROM no_such_table", "tables of another version"),
        ("SELECT no_such_column FROM jobs", "tables of another version"),
        ("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '53100'; END $$", "disk space"),
        ("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40P01'; END $$", "two transactions met"),
        ("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '57P03'; END $$", "shutting down"),
        ("DO $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); END $$", "shutting down"),
        ("SELECT pg_sleep(10)", "took too long"),
        ("SELECT no such syntax", None),
        ("SELECT 1 / 0", None),
        ("INSERT INTO jobs (id) VALUES (NULL)", None),
    ],
)
def test_faults_of_the_server_are_distinguished_from_our_own(
    postgresql: Database, statement: str, fault: str | None
) -> None:
    with pytest.raises(DatabaseError) as raised, postgresql.write() as transaction:
        transaction.session.execute(text("SET LOCAL statement_timeout = 100"))
        transaction.session.execute(text(statement))
    assert (fault or "None") in str(temporary_fault(raised.value))


def test_what_sqlite_has_committed_survives_a_power_failure(sqlite: Database) -> None:
    """In WAL mode only `synchronous=FULL` (2) syncs the log at every commit."""
    with sqlite.read() as transaction:
        assert transaction.session.scalar(text("PRAGMA journal_mode")) == "wal"
        assert transaction.session.scalar(text("PRAGMA synchronous")) == 2


def test_faults_of_an_sqlite_file_are_distinguished_from_our_own(sqlite_url: str) -> None:
    faults = {
        "SELECT * FROM no_such_table": "tables of another version",
        "SELECT no_such_column FROM jobs": "tables of another version",
        "SELECT no such syntax": "None",
        "INSERT INTO jobs (id) VALUES (NULL)": "None",
    }
    with closing(Database(sqlite_url)) as database:
        for statement, fault in faults.items():
            with pytest.raises(DatabaseError) as raised, database.write() as transaction:
                transaction.session.execute(text(statement))
            assert fault in str(temporary_fault(raised.value))
        with database.read() as transaction:
            transaction.session.execute(text("PRAGMA query_only = on"))
            with pytest.raises(DatabaseError) as raised:
                transaction.session.execute(text("DELETE FROM jobs"))
        assert temporary_fault(raised.value) == "the database file is read-only"


def test_a_statement_that_fails_raises_a_database_error(database: Database) -> None:
    with pytest.raises(DatabaseError), database.read() as transaction:
        transaction.session.execute(text("SELECT * FROM no_such_table"))


def test_times_come_back_in_utc(database: Database, clock: Clock) -> None:
    assert fetch(database, submit(database).id).created_at.isoformat() == clock.now.isoformat()


def test_a_transaction_has_one_time(each_database_url: str) -> None:
    with closing(Database(each_database_url)) as database, database.write() as transaction:
        first = transaction.now
        transaction.session.execute(select(Job)).all()
        assert transaction.now == first


def test_a_transaction_that_is_over_takes_no_connection(each_database_url: str) -> None:
    """It would never return it, and the process would soon have none left."""
    with closing(Database(each_database_url)) as opened:
        with opened.read() as transaction:
            pass
        with pytest.raises(InvalidRequestError, match="closed"):
            transaction.session.scalar(select(1))


def test_sqlite_writers_that_read_first_wait_for_each_other(sqlite: Database) -> None:
    """If the lock were taken at the first write, the second writer's snapshot would be too old to write on."""
    job = submit(sqlite)

    def count_up(_: int) -> None:
        with sqlite.write() as transaction:
            row = transaction.session.get_one(Job, job.id)
            row.priority = row.priority + 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count_up, range(40)))
    assert fetch(sqlite, job.id).priority == 40


def test_an_sqlite_reader_does_not_wait_for_the_writer(sqlite: Database) -> None:
    job = submit(sqlite)
    with sqlite.write() as transaction:
        transaction.session.execute(text("UPDATE jobs SET priority = 9"))
        assert fetch(sqlite, job.id).priority == 0
    assert fetch(sqlite, job.id).priority == 9


def test_committed_rows_are_visible_before_the_database_is_closed(sqlite: Database) -> None:
    submit(sqlite)
    path = sqlite.engine.url.database
    assert path is not None
    with closing(sqlite3.connect(path)) as another:
        assert another.execute("SELECT status FROM jobs").fetchall() == [(State.QUEUED,)]
    assert len(all_jobs(sqlite)) == 1


def _execute(database: Database, statement: str) -> None:
    with database.engine.connect() as connection:
        connection.execute(text(statement))
        connection.commit()
