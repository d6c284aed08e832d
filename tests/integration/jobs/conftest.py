"""The databases of these tests, and the clock that they live by."""

from collections.abc import Iterator
from contextlib import closing

import pytest
from sqlalchemy import delete

from tests.integration.jobs.examples import Clock
from tests.services.postgres import Postgres
from zcore.jobs.database import Database
from zcore.jobs.models import Input, Job, Worker


@pytest.fixture
def clock() -> Clock:
    """A time that stands still until a test moves it."""
    return Clock()


@pytest.fixture(scope="session")
def shared_record_url(postgres: Postgres, migrated_template: str) -> Iterator[str]:
    """One PostgreSQL database for all these tests: emptying it is much faster than making another."""
    with postgres.database(migrated_template) as url:
        yield url


@pytest.fixture
def postgresql(shared_record_url: str, clock: Clock) -> Iterator[Database]:
    """An empty record on PostgreSQL."""
    with closing(Database(shared_record_url, clock=clock)) as opened:
        yield opened
        with opened.write() as transaction:
            transaction.session.execute(delete(Job))
            transaction.session.execute(delete(Worker))
            transaction.session.execute(delete(Input))


@pytest.fixture
def sqlite(sqlite_url: str, clock: Clock) -> Iterator[Database]:
    """An empty record on SQLite."""
    with closing(Database(sqlite_url, clock=clock)) as opened:
        yield opened


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Database:
    """An empty record, on SQLite and then on PostgreSQL."""
    opened: Database = request.getfixturevalue(request.param)
    return opened
