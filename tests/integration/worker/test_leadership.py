"""Of all the processes that could do the maintenance one does it, and an idle one asks the database little."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import pytest

from tests.integration.jobs.examples import Clock, claim, rescue, submit
from tests.integration.worker.conftest import DAY_S, LEASE_S, Environment
from tests.statements import counted
from worker.maintenance.leadership import WORK, Leadership
from worker.maintenance.scheduler import Maintenance
from worker.shutdown import Shutdown
from zcore.jobs import leadership, webhooks
from zcore.jobs.database import Database
from zcore.jobs.models import Leader, Sweep
from zcore.settings import JobsSettings, WorkerSettings

PROCESSES = 5


@pytest.fixture
def clock() -> Clock:
    """A clock that all processes share."""
    return Clock()


@pytest.fixture
def candidates(each_database_url: str, clock: Clock) -> Iterator[list[Leadership]]:
    """The processes that could lead."""
    with ExitStack() as stack:
        databases = [stack.enter_context(closing(Database(each_database_url, clock=clock))) for _ in range(PROCESSES)]
        yield [Leadership(database, lambda: clock.now.timestamp()) for database in databases]


def leaders(candidates: list[Leadership]) -> list[Leadership]:
    """Let every process seek the leadership; return those that lead then."""
    for candidate in candidates:
        candidate.seek()
    return [candidate for candidate in candidates if candidate.is_held]


def test_one_process_leads_and_renews_its_term(candidates: list[Leadership], clock: Clock) -> None:
    (leader,) = leaders(candidates)
    for _ in range(60):
        clock.advance(1)
        assert leaders(candidates) == [leader]


def test_a_leader_that_is_killed_is_replaced_within_ten_seconds(candidates: list[Leadership], clock: Clock) -> None:
    (killed,) = leaders(candidates)
    for _ in range(7):
        clock.advance(1)
        leaders(candidates)
    others = [candidate for candidate in candidates if candidate is not killed]
    for _ in range(10):
        clock.advance(1)
        leaders(others)
    assert len([other for other in others if other.is_held]) == 1
    assert not killed.seek(), "it was only suspended, and comes back"


def test_a_leader_follows_the_clock_of_the_database(each_database_url: str, clock: Clock) -> None:
    steady = Clock()
    with closing(Database(each_database_url, clock=clock)) as database:
        candidates = [Leadership(database, lambda: steady.now.timestamp()) for _ in range(3)]
        (leader,) = leaders(candidates)
        job = submit(database)
        claim(database)
        clock.advance(-3600)
        for seconds in range(1, 60):
            clock.advance(1)
            steady.advance(1)
            found = leaders(candidates)
            assert found == [leader] or seconds < 20  # another may take the lead, but only one leads
            leader = found[-1]
        assert [rescued.id for rescued in rescue(database)] == [job.id]


def test_a_leader_that_stops_is_replaced(candidates: list[Leadership], clock: Clock) -> None:
    (leader,) = leaders(candidates)
    leader.resign()
    assert not leader.is_held
    clock.advance(10)
    assert leaders(candidates)[0] in candidates


def test_a_leader_that_cannot_renew_stops_at_the_end_of_its_term(candidates: list[Leadership], clock: Clock) -> None:
    (leader,) = leaders(candidates)
    clock.advance(7.9)
    assert leader.is_held
    clock.advance(0.1)
    assert not leader.is_held


def test_of_many_that_seek_at_once_one_leads(database_url: str) -> None:
    with ExitStack() as stack, ThreadPoolExecutor(8) as pool:
        databases = [stack.enter_context(closing(Database(database_url))) for _ in range(8)]
        taken = list(pool.map(lambda database: Leadership(database).seek(), databases))
    assert sorted(taken) == [False] * 7 + [True]


def test_a_leader_whose_row_another_process_took_does_nothing_more(
    environment: Environment, maintenance: Maintenance
) -> None:
    maintenance.run_once()
    assert maintenance.leadership.is_held
    with environment.database.write() as transaction:
        transaction.session.query(Leader).update({"holder": "another"})
        transaction.session.query(Sweep).update({"after": "unchanged"})
    environment.storage.put("jobs/probe", b"", "image/png")
    maintenance.run_once()
    assert not maintenance.leadership.is_held
    with environment.database.read() as transaction:
        assert {sweep.after for sweep in transaction.session.query(Sweep)} == {"unchanged"}


def test_only_the_holder_can_resign(environment: Environment) -> None:
    with environment.database.write() as transaction:
        assert leadership.take(transaction, WORK, "one", 60)
        leadership.resign(transaction, WORK, "two")
        assert not leadership.take(transaction, WORK, "two", 60)
        leadership.resign(transaction, WORK, "one")
        assert leadership.take(transaction, WORK, "two", 60)


def test_an_idle_fleet_asks_the_database_at_most_three_times_a_second(
    each_database_url: str, environment: Environment
) -> None:
    """Five processes with maintenance, for a hundred seconds that a clock pretends."""
    seconds = 100
    now_s = [0.0]
    with ExitStack() as stack:
        databases = [stack.enter_context(closing(Database(each_database_url))) for _ in range(PROCESSES)]
        processes = [
            Maintenance(
                database,
                environment.storage,
                environment.notifications.notify_again,
                environment.ended.set,
                WorkerSettings().maintenance_interval_s,
                Shutdown(0),
                DAY_S,
                JobsSettings().history_s,
                LEASE_S,
                clock=lambda: now_s[0],
            )
            for database in databases
        ]
        for process in processes * 4:  # the first runs sweep the empty storage
            process.run_once()
        with counted(*databases) as asked:
            for second in range(seconds):
                now_s[0] += 1
                for process in processes:
                    process.run_once()
                if second % 10 == 0:  # each process looks for webhooks every tenth interval
                    for database in databases:
                        with database.write() as transaction:
                            assert webhooks.claim_due(transaction, 8, hold_s=60) == []
    print(f"{len(asked.statements) / seconds:.2f} statements, {asked.begun / seconds:.2f} transactions a second")
    assert len(asked.statements) <= 3 * seconds
    assert asked.begun <= 3 * seconds
