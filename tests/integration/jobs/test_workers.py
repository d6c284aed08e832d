"""Workers are present while they report."""

from contextlib import closing

from tests.integration.jobs.examples import Clock
from tests.statements import counted
from zcore.jobs import workers
from zcore.jobs.database import Database
from zcore.jobs.workers import PRESENCE_TIMEOUT_S
from zcore.stages import Stage


def report(database: Database, name: str) -> None:
    with database.write() as transaction:
        workers.report(transaction, name, "demo", "cpu")


def present(database: Database) -> list[str]:
    with database.read() as transaction:
        return [worker.name for worker in workers.present(transaction)]


def test_a_worker_is_present_while_it_reports(database: Database, clock: Clock) -> None:
    report(database, "one")
    clock.advance(PRESENCE_TIMEOUT_S / 2)
    report(database, "two")
    assert present(database) == ["one", "two"]
    report(database, "one")
    clock.advance(PRESENCE_TIMEOUT_S)
    assert present(database) == ["one", "two"]
    clock.advance(0.001)
    assert present(database) == []
    report(database, "two")
    assert present(database) == ["two"]


def test_a_removed_worker_is_gone_at_once(database: Database) -> None:
    report(database, "one")
    report(database, "two")
    with database.write() as transaction:
        workers.remove(transaction, "one")
        workers.remove(transaction, "never there")
    assert present(database) == ["two"]


def test_only_workers_not_seen_for_a_day_are_deleted(database: Database, clock: Clock) -> None:
    report(database, "one")
    clock.advance(86_400)
    with database.write() as transaction:
        workers.forget_lost(transaction)
    clock.advance(-86_400)
    assert present(database) == ["one"]
    clock.advance(86_400 + 1)
    with database.write() as transaction:
        workers.forget_lost(transaction)
    clock.advance(-86_400 - 1)
    assert present(database) == []


def test_a_restarted_worker_of_the_same_name_is_listed_with_its_new_stages(database: Database) -> None:
    report(database, "one")
    with database.write() as transaction:
        workers.report(transaction, "one", "another model", "cuda:0", [Stage.ENCODE])
    with database.read() as transaction:
        (worker,) = workers.present(transaction)
    assert (worker.model, worker.device, worker.stages) == ("another model", "cuda:0", ["encode"])


def test_a_report_is_one_statement_in_one_transaction(each_database_url: str) -> None:
    with closing(Database(each_database_url)) as database:
        report(database, "one")
        with counted(database) as asked:
            report(database, "one")
        assert (len(asked.statements), asked.begun, asked.committed) == (1, 1, 1)


def test_present_workers_are_counted_without_being_listed(database: Database, clock: Clock) -> None:
    report(database, "lost")
    clock.advance(PRESENCE_TIMEOUT_S + 1)
    report(database, "one")
    report(database, "two")
    with database.read() as transaction:
        assert workers.count_present(transaction) == 2
