"""Workers show that they are there, and are missed when they no longer do."""

from tests.integration.jobs.examples import Clock
from zcore.jobs import presence
from zcore.jobs.database import Database
from zcore.jobs.presence import PRESENT_FOR_S


def show(database: Database, name: str) -> None:
    with database.write() as transaction:
        presence.show(transaction, name, "demo", "cpu")


def present(database: Database) -> list[str]:
    with database.read() as transaction:
        return [worker.name for worker in presence.present(transaction)]


def test_a_worker_is_there_as_long_as_it_shows_itself(database: Database, clock: Clock) -> None:
    show(database, "one")
    clock.advance(PRESENT_FOR_S / 2)
    show(database, "two")
    assert present(database) == ["one", "two"]
    show(database, "one")
    clock.advance(PRESENT_FOR_S)
    assert present(database) == ["one", "two"]
    clock.advance(0.001)
    assert present(database) == []
    show(database, "two")
    assert present(database) == ["two"]


def test_a_worker_that_leaves_is_gone_at_once(database: Database) -> None:
    show(database, "one")
    show(database, "two")
    with database.write() as transaction:
        presence.leave(transaction, "one")
        presence.leave(transaction, "never there")
    assert present(database) == ["two"]


def test_only_workers_lost_for_a_day_are_deleted(database: Database, clock: Clock) -> None:
    show(database, "one")
    clock.advance(86_400)
    with database.write() as transaction:
        presence.forget_lost(transaction)
    clock.advance(-86_400)
    assert present(database) == ["one"]
    clock.advance(86_400 + 1)
    with database.write() as transaction:
        presence.forget_lost(transaction)
    clock.advance(-86_400 - 1)
    assert present(database) == []
