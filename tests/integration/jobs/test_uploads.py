"""The record of uploads: one row for an owner's bytes, even during concurrent uploads and deletions."""

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

import pytest

from tests.integration.jobs.examples import Clock, cancel, submission, submit, wait_until_blocked
from zcore.errors import InvalidRequest
from zcore.jobs import uploads
from zcore.jobs.database import Database
from zcore.jobs.models import Input, LeftoverObject
from zcore.jobs.uploads import UploadedImage

SHA256 = "a" * 64
IMAGE = UploadedImage(SHA256, "png", 64, 48, 1234)
DAY_S = 86_400.0


def retain(database: Database, retention_s: float = DAY_S, owner: str = "anna") -> datetime:
    """Record an upload as stored and return its expiry."""
    with database.write() as transaction:
        recorded = uploads.record(transaction, owner, IMAGE)
    with database.write() as transaction:
        stored = uploads.mark_stored(transaction, recorded, retention_s)
    assert stored is not None
    return stored.expires_at


def rows(database: Database) -> list[tuple[str, str]]:
    """Return the owners and hashes of all uploads."""
    with database.read() as transaction:
        return sorted((row.owner, row.sha256) for row in transaction.session.query(Input))


def clear(database: Database) -> int:
    """Delete the expired uploads and return their number."""
    with database.write() as transaction:
        return len(uploads.expire(transaction, 10))


def superfluous(database: Database) -> list[str]:
    """Return the keys of the objects that are to be deleted."""
    with database.read() as transaction:
        return [one.key for one in transaction.session.query(LeftoverObject)]


def test_each_owner_has_one_row_for_the_same_bytes(database: Database, clock: Clock) -> None:
    retain(database)
    clock.advance(60)
    assert retain(database) == clock.now + timedelta(seconds=DAY_S)
    retain(database, owner="ben")
    assert rows(database) == [("anna", SHA256), ("ben", SHA256)]


def test_a_shorter_retention_does_not_shorten_an_earlier_one(database: Database) -> None:
    first = retain(database)
    assert retain(database, retention_s=60) == first


def test_an_upload_can_be_used_until_the_moment_it_expires(database: Database, clock: Clock) -> None:
    retain(database)
    clock.advance(DAY_S - 1)
    submit(database, image=f"input:{SHA256}")
    clock.advance(1)
    with pytest.raises(InvalidRequest, match="image: expired at 2031-05-05 12:00:00 UTC"):
        submit(database, image=f"input:{SHA256}")


def test_an_upload_can_be_used_only_after_its_bytes_are_stored(database: Database) -> None:
    with database.write() as transaction:
        recorded = uploads.record(transaction, "anna", IMAGE)
    with pytest.raises(InvalidRequest, match="image: there is no such upload"):
        submit(database, image=f"input:{SHA256}")
    with database.write() as transaction:
        assert uploads.mark_stored(transaction, recorded, DAY_S) is not None
    submit(database, image=f"input:{SHA256}")


def test_an_upload_that_was_never_stored_is_deleted_soon(database: Database, clock: Clock) -> None:
    with database.write() as transaction:
        uploads.record(transaction, "anna", IMAGE)
    clock.advance((uploads.STORING_TIME + uploads.DELETION_DELAY).total_seconds() - 1)
    assert clear(database) == 0
    clock.advance(1)
    assert clear(database) == 1


def test_an_upload_stored_after_its_row_was_deleted_is_not_marked(database: Database, clock: Clock) -> None:
    with database.write() as transaction:
        late = uploads.record(transaction, "anna", IMAGE)
    clock.advance(DAY_S)
    assert clear(database) == 1
    with database.write() as transaction:
        transaction.session.query(LeftoverObject).delete()
    with database.write() as transaction:
        assert uploads.mark_stored(transaction, late, DAY_S) is None
    assert superfluous(database) == [late.storage_key], "the late bytes are deleted too"
    with database.write() as transaction:
        again = uploads.record(transaction, "anna", IMAGE)
        assert again.storage_key != late.storage_key, "whoever deletes the late bytes does not delete these"
    with database.write() as transaction:
        assert uploads.mark_stored(transaction, late, DAY_S) is None


def test_bytes_uploaded_again_after_their_retention_get_another_key(database: Database, clock: Clock) -> None:
    """The deletion of the earlier object may be under way, and must not meet the new one."""
    with database.write() as transaction:
        first = uploads.record(transaction, "anna", IMAGE).storage_key
    retain(database)
    clock.advance(DAY_S - 1)
    with database.write() as transaction:
        assert uploads.record(transaction, "anna", IMAGE).storage_key == first
    clock.advance(3600)
    assert clear(database) == 1
    assert superfluous(database) == [first]
    with database.write() as transaction:
        renewed = uploads.record(transaction, "anna", IMAGE)
        assert (renewed.storage_key != first, renewed.stored_at) == (True, None)


def test_every_input_that_does_not_exist_is_reported(database: Database) -> None:
    query = submission(image=f"input:{SHA256}", mask="output:01a20719-4142-7484-a819-b2b18c8b5dd4/0").request
    with database.read() as transaction, pytest.raises(InvalidRequest) as raised:
        uploads.check(transaction, query, "anna")
    assert [error.pointer for error in raised.value.errors] == ["/image", "/mask"]


def test_only_the_forgotten_uploads_are_deleted(database: Database, clock: Clock) -> None:
    retain(database)
    retain(database, owner="ben", retention_s=10 * DAY_S)
    clock.advance(2 * DAY_S)
    assert clear(database) == 1
    assert rows(database) == [("ben", SHA256)]


def test_an_upload_that_a_queued_job_uses_is_looked_at_again_in_a_minute(database: Database, clock: Clock) -> None:
    retain(database)
    job = submit(database, image=f"input:{SHA256}")
    clock.advance(2 * DAY_S)
    assert clear(database) == 0
    cancel(database, job.id)
    assert clear(database) == 0, "it is not due every second"
    clock.advance(uploads.DELETION_DELAY.total_seconds())
    assert clear(database) == 1


def test_the_same_bytes_uploaded_twice_at_once_become_one_row(postgresql: Database) -> None:
    with ThreadPoolExecutor(1) as pool:
        with postgresql.write() as transaction:
            uploads.record(transaction, "anna", IMAGE)
            second = pool.submit(retain, postgresql, DAY_S)
            wait_until_blocked(postgresql)
        second.result(30)
    assert rows(postgresql) == [("anna", SHA256)]
    assert retain(postgresql, retention_s=1) == second.result(), "the later expiry of the two"


def test_an_upload_waits_for_the_deletion_of_the_same_bytes(postgresql: Database, clock: Clock) -> None:
    retain(postgresql)
    clock.advance(2 * DAY_S)
    with ThreadPoolExecutor(1) as pool:
        with postgresql.write() as transaction:
            (key,) = uploads.expire(transaction, 10)
            transaction.session.flush()
            again = pool.submit(retain, postgresql)
            wait_until_blocked(postgresql)
        again.result(30)
    assert rows(postgresql) == [("anna", SHA256)]
    with postgresql.read() as transaction:
        assert transaction.session.query(Input).one().storage_key != key


def test_an_upload_that_is_being_renewed_is_not_deleted(postgresql: Database, clock: Clock) -> None:
    retain(postgresql)
    clock.advance(2 * DAY_S)
    with postgresql.write() as transaction:
        uploads.record(transaction, "anna", IMAGE)
        transaction.session.flush()
        assert clear(postgresql) == 0
    assert clear(postgresql) == 0
    assert rows(postgresql) == [("anna", SHA256)]
