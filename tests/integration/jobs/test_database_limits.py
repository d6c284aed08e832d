"""Limits of time: what a frozen server, a frozen link, a lock, a slow statement and a full pool cost a caller."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from sqlalchemy import func, select, text

from tests.integration.broker.tcp_proxy import proxy_to
from tests.services import postgres as postgres_server
from tests.services.postgres import Postgres
from tests.waiting import wait_until
from zcore.jobs.database import Database, DatabaseError, Limits, temporary_fault

SHORT = Limits(pool_s=0.2, connect_s=2, lock_s=0.2, statement_s=0.4, answer_s=1, pause_s=1)
OTHERS = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
END_OTHERS = OTHERS.replace("count(*)", "pg_terminate_backend(pid)")


@dataclass(frozen=True)
class Freezer:
    """A database, and a context in which it is frozen."""

    url: str
    frozen: Callable[[], AbstractContextManager[None]]


@pytest.fixture(params=["server", "link"])
def freezer(request: pytest.FixtureRequest) -> Iterator[Freezer]:
    """A server that can be stopped, or a link that can carry nothing."""
    if request.param == "server":
        with postgres_server.restartable() as (own, service):
            yield Freezer(own.url.render_as_string(hide_password=False), lambda: postgres_server.frozen(service))
    else:
        shared: Postgres = request.getfixturevalue("postgres")
        assert shared.url.port is not None
        with proxy_to(shared.url.port) as cable:
            yield Freezer(shared.url.set(port=cable.port).render_as_string(hide_password=False), cable.frozen)


@pytest.fixture
def limited(database_url: str) -> Iterator[Database]:
    """Open a database with one connection and short limits."""
    with closing(Database(database_url, pool_size=1, limits=SHORT)) as opened:
        yield opened


def test_a_frozen_database_fails_transactions_and_is_used_again_afterwards(freezer: Freezer) -> None:
    with closing(Database(freezer.url, pool_size=1, limits=SHORT)) as database:
        assert ask(database) == "1"  # the pool now has a connection
        with freezer.frozen():
            faults = [fault_of(database), fault_of(database)]
            wait_until(lambda: "timeout expired" in str(fault_of(database)))  # a new connection, after the pause
        wait_until(lambda: answers(database))
    pooled, next_one = faults
    assert "no answer within 1 s" in str(pooled)
    assert "no answer a moment ago" in str(next_one)
    assert {temporary_fault(fault) for fault in faults} == {"the database does not answer"}


def test_a_database_that_freezes_within_a_transaction_rolls_it_back(freezer: Freezer) -> None:
    with closing(Database(freezer.url, pool_size=1, limits=SHORT)) as database, ExitStack() as until_thawed:
        mark = "SELECT pg_try_advisory_xact_lock(1)"
        with pytest.raises(DatabaseError, match="no answer within 1 s"), database.write() as transaction:
            transaction.session.execute(text(mark))
            until_thawed.enter_context(freezer.frozen())
            transaction.session.execute(text(mark))
        until_thawed.close()
        wait_until(lambda: answers(database) and ask(database, mark) == "True")


def test_a_slow_statement_is_ended_by_the_server_and_its_connection_stays(limited: Database) -> None:
    process_id = ask(limited, "SELECT pg_backend_pid()")
    assert temporary_fault(fault_of(limited, "SELECT pg_sleep(60)")) == "a statement took too long"
    assert ask(limited, "SELECT pg_backend_pid()") == process_id


def test_a_lock_is_waited_for_in_limited_time(limited: Database, database_url: str) -> None:
    with closing(Database(database_url)) as other, other.write() as transaction:
        transaction.session.execute(text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"))
        assert temporary_fault(fault_of(limited, "SELECT count(*) FROM jobs")) == "a lock was not granted in time"


@pytest.mark.parametrize("limits", [Limits(idle_s=0.1), Limits(transaction_s=0.1)], ids=["idle", "endless"])
def test_a_transaction_that_does_not_end_is_ended_by_the_server(database_url: str, limits: Limits) -> None:
    with (
        closing(Database(database_url, limits=limits)) as database,
        closing(Database(database_url)) as observer,
    ):
        with pytest.raises(DatabaseError) as raised, database.write() as transaction:
            wait_until(lambda: ask(observer, OTHERS) == "0")
            transaction.session.execute(text("SELECT 1"))
        assert temporary_fault(raised.value) == "a transaction took too long"


def test_migrations_have_no_limits(limited: Database, database_url: str) -> None:
    names = ["lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout", "transaction_timeout"]
    with closing(Database(database_url, limits=None)) as unlimited:
        for name in names:
            assert ask(unlimited, f"SHOW {name}") == "0"
            assert ask(limited, f"SHOW {name}") != "0"


def test_an_older_server_is_not_asked_for_limits_that_it_does_not_have() -> None:
    assert "transaction_timeout" in SHORT.begin(server_version=170_000)
    assert "transaction_timeout" not in SHORT.begin(server_version=160_004)


def test_a_full_pool_is_waited_for_in_limited_time(limited: Database) -> None:
    with limited.read():
        assert temporary_fault(fault_of(limited)) == "all connections of this process are in use"


def test_a_connection_closed_since_its_last_use_is_replaced_before_the_transaction(
    limited: Database, database_url: str
) -> None:
    ask(limited)
    with closing(Database(database_url)) as administrator:
        ask(administrator, END_OTHERS)
    assert ask(limited) == "1"


def test_a_transaction_takes_one_round_trip_besides_its_statements_and_its_commit(
    limited: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limits and the time come with the BEGIN, and no connection is asked whether it still works."""
    ask(limited)
    sent = 0
    original = psycopg.Connection.wait

    def counting(connection: psycopg.Connection[Any], generator: Any, *arguments: Any) -> Any:
        nonlocal sent
        sent += generator.__name__ != "_rollback_gen"  # the pool's, which sends nothing after a commit
        return original(connection, generator, *arguments)

    monkeypatch.setattr(psycopg.Connection, "wait", counting)
    with limited.write() as transaction:
        assert transaction.now == transaction.session.scalars(select(func.now())).one()
    assert sent == len(["BEGIN", "SELECT now()", "COMMIT"])


def ask(database: Database, statement: str = "SELECT 1") -> str:
    """Return the answer to a statement that a transaction of its own commits."""
    with database.write() as transaction:
        return str(transaction.session.scalars(text(statement)).first())


def answers(database: Database) -> bool:
    """Return whether a transaction succeeds now."""
    try:
        return ask(database) == "1"
    except DatabaseError:
        return False


def fault_of(database: Database, statement: str = "SELECT 1") -> DatabaseError:
    with pytest.raises(DatabaseError) as raised:
        ask(database, statement)
    return raised.value
