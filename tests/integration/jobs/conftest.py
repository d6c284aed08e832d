"""Databases of these tests, with a clock that tests control."""

from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.integration.jobs.examples import Clock, empty
from tests.services.postgres import Postgres
from zcore.jobs.database import Database


@pytest.fixture
def clock() -> Clock:
    """Return a clock that stands still until a test advances it."""
    return Clock()


@pytest.fixture(scope="session")
def shared_record_url(postgres: Postgres, migrated_template: str) -> Iterator[str]:
    """Create one PostgreSQL database for all these tests: emptying it is much faster than creating another."""
    with postgres.database(migrated_template) as url:
        yield url


@pytest.fixture
def postgresql(shared_record_url: str, clock: Clock) -> Iterator[Database]:
    """Open an empty PostgreSQL database."""
    with closing(Database(shared_record_url, clock=clock)) as opened:
        yield opened
        empty(opened)


@pytest.fixture
def sqlite(sqlite_url: str, clock: Clock) -> Iterator[Database]:
    """Open an empty SQLite database."""
    with closing(Database(sqlite_url, clock=clock)) as opened:
        yield opened


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Database:
    """Run the test on an empty SQLite database and on an empty PostgreSQL database."""
    opened: Database = request.getfixturevalue(request.param)
    return opened
