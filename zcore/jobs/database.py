"""One engine from one URL, and the two ways to use it: `write()` and `read()`.

Takes a SQLAlchemy URL (SQLite or PostgreSQL); gives transactions. On SQLite a writing transaction takes the write lock
at its beginning, so that two writers queue up instead of failing. Does not know the tables' meaning.
"""

import sqlite3
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, func, make_url, select
from sqlalchemy.exc import ArgumentError, OperationalError
from sqlalchemy.orm import Session

from zcore.errors import ConfigurationError

SQLITE_BUSY_TIMEOUT_S = 30
CONNECT_TIMEOUT_S = 5
LOST_PEER_TIMEOUT_MS = 20_000  # a host that vanished without a word is given up after this, not after TCP's minutes


@dataclass(frozen=True, slots=True)
class Transaction:
    """An open session, and the one time that everything in it happens at.

    The time is the database's where it has a clock of its own, so that hosts whose clocks differ agree about leases.
    """

    session: Session
    now: datetime


class Database:
    """The database of this process. Safe to share between threads; not to be carried over a fork."""

    def __init__(self, url: str, pool_size: int = 10, clock: Callable[[], datetime] | None = None) -> None:
        """Connects on first use.

        `clock` replaces the time in tests. Raises `ConfigurationError` for a URL of another kind.
        """
        self.engine = _create_engine(url, pool_size)
        self._writing = self.engine.execution_options(immediate=True)
        self._clock = clock

    @contextmanager
    def write(self) -> Generator[Transaction]:
        """A transaction that commits at the end of the block, or rolls back when the block raises."""
        with Session(self._writing, expire_on_commit=False) as session, session.begin():
            session.connection()  # SQLite's write lock first: the time of what waited for it is when it came through
            yield Transaction(session, self._now(session))

    @contextmanager
    def read(self) -> Generator[Transaction]:
        """A transaction that never writes."""
        with Session(self.engine, expire_on_commit=False) as session:
            yield Transaction(session, self._now(session))

    def is_reachable(self) -> bool:
        """Whether the database answers."""
        try:
            with self.engine.connect() as connection:
                connection.execute(select(1))
        except OperationalError:
            return False
        return True

    def close(self) -> None:
        """Closes every pooled connection."""
        self.engine.dispose()

    def _now(self, session: Session) -> datetime:
        if self._clock is not None:
            return self._clock()
        if self.engine.dialect.name == "postgresql":
            return session.scalars(select(func.now())).one().astimezone(UTC)
        return datetime.now(UTC)


def _create_engine(url: str, pool_size: int) -> Engine:
    try:
        parsed = make_url(url)
    except ArgumentError as fault:
        raise ConfigurationError("database.url: is not a SQLAlchemy URL") from fault
    if parsed.get_backend_name() == "postgresql":
        return create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            pool_size=pool_size,
            max_overflow=pool_size,
            pool_pre_ping=True,
            hide_parameters=True,  # an error's text goes to the log, and prompts do not
            connect_args={"connect_timeout": CONNECT_TIMEOUT_S, "tcp_user_timeout": LOST_PEER_TIMEOUT_MS},
        )
    if parsed.get_backend_name() != "sqlite":
        raise ConfigurationError(
            f"database.url: {parsed.get_backend_name()} is not supported; sqlite and postgresql are"
        )
    if parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(
        parsed,
        pool_size=pool_size,
        hide_parameters=True,
        connect_args={"timeout": SQLITE_BUSY_TIMEOUT_S, "check_same_thread": False},
    )
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    """Readers do not wait for the writer (WAL), and transactions begin where SQLAlchemy says, not where the driver
    guesses.
    """
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    immediate = connection.get_execution_options().get("immediate", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")
