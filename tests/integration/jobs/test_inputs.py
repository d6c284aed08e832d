"""The record of uploads: one row for an owner's bytes, whoever else uploads or clears at the same moment."""

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

import pytest

from tests.integration.jobs.examples import Clock, submission, submit, wait_until_blocked
from zcore.errors import InvalidRequest
from zcore.jobs import inputs
from zcore.jobs.database import Database
from zcore.jobs.inputs import UploadedPicture
from zcore.jobs.models import Input

SHA256 = "a" * 64
PICTURE = UploadedPicture(SHA256, "png", 64, 48, 1234)
DAY_S = 86_400.0


def keep(database: Database, retention_s: float = DAY_S, owner: str = "anna") -> datetime:
    """One upload; when its time ends."""
    with database.write() as transaction:
        return inputs.keep(transaction, owner, PICTURE, retention_s).expires_at


def rows(database: Database) -> list[tuple[str, str]]:
    """Whose uploads are on record."""
    with database.read() as transaction:
        return sorted((row.owner, row.sha256) for row in transaction.session.query(Input))


def clear(database: Database) -> int:
    """What the clock does with uploads past their time; how many there were."""
    with database.write() as transaction:
        past = inputs.past_retention(transaction, 10)
        for row in past:
            transaction.session.delete(row)
    return len(past)


def test_each_owner_has_one_row_for_the_same_bytes(database: Database, clock: Clock) -> None:
    keep(database)
    clock.advance(60)
    assert keep(database) == clock.now + timedelta(seconds=DAY_S)
    keep(database, owner="ben")
    assert rows(database) == [("anna", SHA256), ("ben", SHA256)]


def test_a_shorter_retention_takes_nothing_from_an_earlier_upload(database: Database) -> None:
    first = keep(database)
    assert keep(database, retention_s=60) == first


def test_an_upload_can_be_named_until_the_very_end_of_its_time(database: Database, clock: Clock) -> None:
    keep(database)
    clock.advance(DAY_S - 1)
    submit(database, image=f"input:{SHA256}")
    clock.advance(1)
    with pytest.raises(InvalidRequest, match="image: expired at 2031-05-05 12:00:00 UTC"):
        submit(database, image=f"input:{SHA256}")


def test_every_address_that_leads_nowhere_is_named(database: Database) -> None:
    wanted = submission(image=f"input:{SHA256}", mask="output:01a20719-4142-7484-a819-b2b18c8b5dd4/0").request
    with database.read() as transaction, pytest.raises(InvalidRequest) as raised:
        inputs.check(transaction, wanted, "anna")
    assert [error.pointer for error in raised.value.errors] == ["/image", "/mask"]


def test_the_same_bytes_uploaded_twice_at_once_become_one_row(postgresql: Database) -> None:
    with ThreadPoolExecutor(1) as pool:
        with postgresql.write() as transaction:
            inputs.keep(transaction, "anna", PICTURE, 60)
            second = pool.submit(keep, postgresql, DAY_S)
            wait_until_blocked(postgresql)
        second.result(30)
    assert rows(postgresql) == [("anna", SHA256)]
    assert keep(postgresql, retention_s=1) == second.result(), "the later end of the two"


def test_an_upload_under_deletion_waits_and_is_on_record_afterwards(postgresql: Database, clock: Clock) -> None:
    keep(postgresql)
    clock.advance(2 * DAY_S)
    with ThreadPoolExecutor(1) as pool:
        with postgresql.write() as transaction:
            (past,) = inputs.past_retention(transaction, 10)
            again = pool.submit(keep, postgresql)
            wait_until_blocked(postgresql)
            transaction.session.delete(past)
        again.result(30)
    assert rows(postgresql) == [("anna", SHA256)]


def test_an_upload_that_is_being_renewed_is_not_cleared(postgresql: Database, clock: Clock) -> None:
    keep(postgresql)
    clock.advance(2 * DAY_S)
    with postgresql.write() as transaction:
        inputs.keep(transaction, "anna", PICTURE, DAY_S)
        transaction.session.flush()
        assert clear(postgresql) == 0
    assert clear(postgresql) == 0
    assert rows(postgresql) == [("anna", SHA256)]
