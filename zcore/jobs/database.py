"""The database of jobs: one engine from one URL, used through `write()` and `read()`.

Takes a SQLAlchemy URL of SQLite or PostgreSQL. On SQLite a writing transaction takes the write lock when it begins, so
that two writers wait for each other instead of failing. On PostgreSQL every wait has a limit, set with the BEGIN of
each transaction, so that the limits also hold behind a pooler like pgbouncer, whose sessions are shared. Also knows
which errors pass by themselves. Does not know what the tables mean.
"""

import secrets
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import psycopg
from psycopg.abc import RV, PQGen
from psycopg.errors import ConnectionTimeout
from psycopg.pq import TransactionStatus
from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Dialect,
    Engine,
    ExceptionContext,
    Interval,
    TextClause,
    create_engine,
    event,
    func,
    literal,
    make_url,
    select,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import InstrumentedAttribute, Session

from zcore.errors import ConfigurationError
from zcore.foreign_text import first_line
from zcore.jobs.models import Table, UtcDateTime

Condition = ColumnElement[bool] | TextClause
"""A condition of a statement; as text where PostgreSQL must recognize the condition of an index."""

DatabaseError = SQLAlchemyError
"""Base class of the errors that a database operation can raise, so that callers do not import SQLAlchemy."""


class UnansweredError(DatabaseError):
    """The server is not asked, because it has just given no answer."""


SQLITE_BUSY_TIMEOUT_S = 30
SQLITE_CONNECTIONS = 20  # files in this process; unlike connections to a server they cost nothing
POSTGRESQL_17 = 170_000
MIGRATIONS = Path(__file__).resolve().parents[2] / "migrations" / "versions"

READ_ONLY = "25006"
UNREACHABLE = "the database does not answer"
OTHER_SCHEMA = "the database has the tables of another version; run `alembic upgrade head`"
# Errors that pass without a change of our code, by SQLSTATE or by its first characters (PostgreSQL, appendix A).
TEMPORARY_FAULTS = {
    "08": UNREACHABLE,
    READ_ONLY: "the database is read-only",
    "25P03": "a transaction took too long",
    "25P04": "a transaction took too long",
    "40001": "two transactions met",
    "40P01": "two transactions met",
    "42703": OTHER_SCHEMA,
    "42P01": OTHER_SCHEMA,
    "53": "the database server lacks connections, memory or disk space",
    "55P03": "a lock was not granted in time",
    "57014": "a statement took too long",
    "57P": "the database server is shutting down or starting",
    "58": "the disk of the database server failed",
}
# The same for SQLite, by its primary result code.
TEMPORARY_SQLITE_FAULTS = {
    sqlite3.SQLITE_BUSY: "the database file is locked",
    sqlite3.SQLITE_LOCKED: "the database file is locked",
    sqlite3.SQLITE_READONLY: "the database file is read-only",
    sqlite3.SQLITE_IOERR: "the disk of the database file failed",
    sqlite3.SQLITE_FULL: "the disk of the database file is full",
    sqlite3.SQLITE_CANTOPEN: "the database file cannot be opened",
    sqlite3.SQLITE_PROTOCOL: "the database file is locked",
}


@dataclass(frozen=True)
class Limits:
    """How long PostgreSQL may take, in seconds, before a caller gets an error.

    A transaction that meets a server that hangs, or waits for a connection and then for a lock, fails within 10 s.
    """

    pool_s: float = 3
    """For a connection of this process to become free."""
    connect_s: int = 3
    lock_s: float = 3
    statement_s: float = 5
    answer_s: float = 6
    """For each answer, as measured here. Longer than `statement_s`: only a server that hangs, or a lost link, exceeds
    it, and the connection is discarded."""
    pause_s: float = 1
    """Before a server that gave no answer is asked again; transactions fail at once meanwhile."""
    idle_s: float = 15
    """For this process to send the next statement of a transaction. Afterwards its locks are released."""
    transaction_s: float = 30

    def begin(self, server_version: int) -> str:
        """Return the statements that begin a limited transaction, sent at once, in one round trip."""
        values = {
            "lock_timeout": self.lock_s,
            "statement_timeout": self.statement_s,
            "idle_in_transaction_session_timeout": self.idle_s,
        }
        if server_version >= POSTGRESQL_17:
            values["transaction_timeout"] = self.transaction_s
        return "; ".join(["BEGIN", *(f"SET LOCAL {name} = {round(1000 * value)}" for name, value in values.items())])


DEFAULT_LIMITS = Limits()
WRITES = "writes"
"""Execution option of connections whose transactions write."""
BEGAN_AT = "began_at"
"""Key of the time of the transaction in the `info` of a connection to PostgreSQL that writes."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class IdSource:
    """Makes ids that increase strictly, even if the time goes back. Safe to share between threads."""

    def __init__(self) -> None:
        self._last = 0
        self._lock = threading.Lock()

    def new(self, now: datetime) -> uuid.UUID:
        """Return a UUIDv7 of this time: milliseconds, 12 bits of their fraction (RFC 9562, 6.2, method 3), random."""
        moment = (now - _EPOCH) // timedelta(microseconds=1) * 4096 // 1000
        with self._lock:
            self._last = moment = max(moment, self._last + 1)
        return uuid.UUID(int=(moment >> 12) << 80 | 7 << 76 | (moment & 0xFFF) << 64 | 2 << 62 | secrets.randbits(62))


class Transaction:
    """An open session, and the time at which everything in it happens.

    The time is the database's if it has a clock, so that hosts whose clocks differ agree about leases and about the
    order of ids.
    """

    def __init__(self, session: Session, clock: Callable[[], datetime] | None, ids: IdSource) -> None:
        """Without a `clock`, the time is that of the database."""
        self.session = session
        self._clock = clock
        self._ids = ids

    @cached_property
    def now(self) -> datetime:
        """The time of this transaction. A transaction that only reads asks for it when this is first read."""
        if self._clock is not None:
            return self._clock()
        began_at = self.session.connection().info.get(BEGAN_AT)
        return (began_at or self.session.scalars(select(func.now())).one()).astimezone(UTC)

    def time(self, offset_s: float = 0.0) -> ColumnElement[datetime]:
        """Return `now` plus an offset as an expression. Unlike `now`, it never costs a statement of its own."""
        offset = timedelta(seconds=offset_s)
        if self._clock is not None:
            return literal(self.now + offset, UtcDateTime())
        return func.now() + offset

    def earlier(self, column: InstrumentedAttribute[Any], by_s: float) -> ColumnElement[datetime]:
        """Return the time in a column minus some seconds, as an expression."""
        if self.is_postgresql:
            return column - literal(timedelta(seconds=by_s), Interval())
        return func.strftime("%Y-%m-%d %H:%M:%f000", column, f"-{by_s:.3f} seconds", type_=UtcDateTime())

    def new_id(self) -> uuid.UUID:
        """Return a new UUIDv7. Ids sort by time, and those of one process in the order in which they were made."""
        return self._ids.new(self.now)

    @property
    def is_postgresql(self) -> bool:
        """Whether the database is PostgreSQL, which many transactions write at once."""
        return self.session.get_bind().dialect.name == "postgresql"

    def insert(self, table: type[Table]) -> postgresql.Insert | sqlite.Insert:
        """Return an INSERT that can say what to do on a conflict; the two dialects share no such statement."""
        return postgresql.insert(table) if self.is_postgresql else sqlite.insert(table)


class Database:
    """The database of this process. Safe to share between threads; must not be used across a fork."""

    def __init__(
        self,
        url: str,
        pool_size: int = 8,
        overflow: int = 0,
        clock: Callable[[], datetime] | None = None,
        limits: Limits | None = DEFAULT_LIMITS,
    ) -> None:
        """Prepare the engine; the first use connects.

        Of the connections to PostgreSQL, `pool_size` stay open after their first use; `overflow` more are opened while
        all of them are in use. Without `limits`, statements may take any time, as migrations must.
        `clock` replaces the time in tests. Raises `ConfigurationError` if the URL is neither SQLite's nor PostgreSQL's.
        """
        self.engine = _create_engine(url, pool_size, overflow, limits)
        self._pause_s = limits.pause_s if limits else 0.0
        self._paused_until = 0.0
        self._writing_engine = self.engine.execution_options(**{WRITES: True})
        has_clock = self.engine.dialect.name == "postgresql"
        # On PostgreSQL it changes nothing, but a standby refuses it, and the pool then discards its connections to it.
        # On SQLite it writes the row again, because a full disk is noticed only when something is written.
        self._probe = f"UPDATE alembic_version SET version_num = version_num WHERE {'false' if has_clock else 'true'}"
        self._clock = clock or (None if has_clock else lambda: datetime.now(UTC))
        self._ids = IdSource()

    @contextmanager
    def write(self, limits: Limits | None = None) -> Generator[Transaction]:
        """Open a transaction that commits at the end of the block, or rolls back if the block raises.

        `limits` hold in it instead of those of the database.
        """
        engine = self._writing_engine
        with self._session(engine.execution_options(limits=limits) if limits else engine) as session:
            self._begin(session)  # takes SQLite's write lock before the time is read
            yield Transaction(session, self._clock, self._ids)
            session.commit()

    @contextmanager
    def read(self) -> Generator[Transaction]:
        """Open a transaction that never commits."""
        with self._session(self.engine) as session:
            self._begin(session)
            yield Transaction(session, self._clock, self._ids)

    def unready_reason(self) -> str | None:
        """Return why the database takes no jobs, or None: it answers, can be written, and has at least our tables.

        Newer tables will do, because a migration comes before the processes that need it. Raises `DatabaseError` on
        errors that do not pass by themselves.
        """
        try:
            with self.write() as transaction:
                transaction.session.execute(text(self._probe))
                found = transaction.session.scalars(text("SELECT version_num FROM alembic_version")).one_or_none()
        except DatabaseError as error:
            if (reason := temporary_fault(error)) is None:
                raise
            return first_line(f"{reason}: {error.orig if isinstance(error, DBAPIError) else error}")
        if found is None or found < newest_revision():
            return f"{OTHER_SCHEMA}: revision {found} instead of {newest_revision()}"
        return None

    def close(self) -> None:
        """Close every pooled connection."""
        self.engine.dispose()

    @staticmethod
    def _session(engine: Engine) -> Session:
        """Return a session that cannot be used after it was closed: it would take a connection and never return it."""
        return Session(engine, expire_on_commit=False, close_resets_only=False)

    def _begin(self, session: Session) -> None:
        """Begin a transaction, on a new connection if the pooled one was closed since its last use.

        This saves asking each connection whether it still works. If the server gives no answer, the threads that come
        next do not wait for it one after another: until the pause ends they fail at once.
        """
        if time.monotonic() < self._paused_until:
            raise UnansweredError("the database server gave no answer a moment ago")
        try:
            try:
                session.connection()
            except DBAPIError as error:
                if not error.connection_invalidated or isinstance(error.orig, ConnectionTimeout):
                    raise
                session.rollback()
                session.connection()
        except DBAPIError as error:
            if isinstance(error.orig, ConnectionTimeout):
                self._paused_until = time.monotonic() + self._pause_s
            raise


def temporary_fault(error: DatabaseError) -> str | None:
    """Return what is wrong with the database if the same call may succeed later; None if the call itself is wrong."""
    if isinstance(error, PoolTimeoutError):
        return "all connections of this process are in use"
    if isinstance(error, UnansweredError):
        return UNREACHABLE
    if not isinstance(error, DBAPIError):
        return None
    original = error.orig
    if isinstance(original, psycopg.Error) and (state := original.sqlstate) is not None:
        return next((fault for prefix, fault in TEMPORARY_FAULTS.items() if state.startswith(prefix)), None)
    if isinstance(original, sqlite3.OperationalError):
        if _is_sqlite_schema_fault(original):
            return OTHER_SCHEMA
        return TEMPORARY_SQLITE_FAULTS.get(original.sqlite_errorcode & 0xFF)
    # The driver's own errors: it could not connect, or lost the connection.
    return UNREACHABLE if isinstance(original, psycopg.OperationalError | psycopg.InterfaceError) else None


class _LimitedConnection(psycopg.Connection[Any]):
    """A connection that waits `answer_s` seconds for each answer, and closes if none comes.

    Limits of the server do not help while its host is frozen, and TCP keeps such a connection open.
    """

    answer_s = DEFAULT_LIMITS.answer_s

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        """Wait for one answer. Raises `ConnectionTimeout` if the server gives none."""
        try:
            return super().wait(gen, interval, self.answer_s if timeout is None else timeout)
        except psycopg.OperationalError as error:
            if self.info.transaction_status != TransactionStatus.ACTIVE:
                raise  # this is an answer, or the connection is lost
            self.close()
            raise ConnectionTimeout(f"the database server gave no answer within {self.answer_s:g} s") from error


@cache
def newest_revision() -> str:
    """Return the revision that this version's tables need: the last one in the folder of migrations."""
    return max((path.name.partition("_")[0] for path in MIGRATIONS.glob("[0-9]*_*.py")), default="")


def _is_sqlite_schema_fault(error: sqlite3.OperationalError) -> bool:
    return error.sqlite_errorcode == sqlite3.SQLITE_ERROR and str(error).startswith(("no such table", "no such column"))


def _discard_useless_connections(context: ExceptionContext) -> None:
    """Have the pool close all its connections if one leads to a server that became read-only, as after a failover."""
    original = context.original_exception
    if context.connection is not None and isinstance(original, psycopg.Error) and original.sqlstate == READ_ONLY:
        context.is_disconnect = True


def _create_engine(url: str, pool_size: int, overflow: int, limits: Limits | None) -> Engine:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigurationError(
            "database.url: must be a SQLAlchemy URL, such as sqlite:///jobs.db or postgresql://user@host/name"
        ) from error
    if parsed.get_backend_name() == "postgresql":
        return _create_postgresql_engine(parsed, pool_size, overflow, limits)
    if parsed.get_backend_name() == "sqlite":
        return _create_sqlite_engine(parsed)
    raise ConfigurationError(f"database.url: must be a sqlite or postgresql URL, not {parsed.get_backend_name()}")


def _create_postgresql_engine(url: URL, pool_size: int, overflow: int, limits: Limits | None) -> Engine:
    waits = limits or DEFAULT_LIMITS
    engine = create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_size=pool_size,
        max_overflow=overflow,
        pool_timeout=waits.pool_s,
        pool_use_lifo=True,
        use_native_hstore=False,
        hide_parameters=True,  # errors are logged, and prompts must not be
        connect_args={
            "connect_timeout": waits.connect_s,
            "autocommit": True,  # the driver begins no transactions, `begin` below does
            "prepare_threshold": None,  # a pooler gives each transaction another session
        },
    )

    def connect(_dialect: Dialect, _record: Any, arguments: Any, named: Any) -> psycopg.Connection[Any]:
        if limits is None:
            return psycopg.connect(*arguments, **named)
        connection = _LimitedConnection.connect(*arguments, **named)
        connection.answer_s = limits.answer_s
        return connection

    def begin(connection: Connection) -> None:
        if connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
            return  # each statement is a transaction of its own
        driver_connection = connection.connection.driver_connection
        assert isinstance(driver_connection, psycopg.Connection)
        chosen: Limits | None = connection.get_execution_options().get("limits", limits)
        if chosen and isinstance(driver_connection, _LimitedConnection):
            driver_connection.answer_s = chosen.answer_s
        statement = chosen.begin(driver_connection.info.server_version) if chosen else "BEGIN"
        connection.info.pop(BEGAN_AT, None)
        if connection.get_execution_options().get(WRITES, False):
            # Statements sent together are one transaction, of which BEGIN is the continuation: this saves a round trip.
            connection.info[BEGAN_AT] = connection.exec_driver_sql(f"SELECT now(); {statement}").scalar_one()
        else:
            connection.exec_driver_sql(statement)

    event.listen(engine, "do_connect", connect)
    event.listen(engine, "begin", begin)
    event.listen(engine, "handle_error", _discard_useless_connections)
    return engine


def _create_sqlite_engine(url: URL) -> Engine:
    if url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(
        url,
        pool_size=SQLITE_CONNECTIONS,
        hide_parameters=True,
        connect_args={"timeout": SQLITE_BUSY_TIMEOUT_S, "check_same_thread": False},
    )
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    """Use WAL, so that readers do not wait for the writer, and let SQLAlchemy begin the transactions.

    The driver would begin them only before certain statements.
    """
    connection.isolation_level = None
    # FULL syncs the log at every commit; with NORMAL a power failure could take accepted jobs back.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
