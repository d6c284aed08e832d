"""The record of uploaded images, and the check that the inputs of a request exist.

Takes a `Transaction`. A row is committed before its bytes are stored, and becomes a row of `leftovers` before they are
deleted, so that no object in storage lacks a row. Requests find it only once its bytes are stored. An owner finds only
their own uploads and images. Does not access storage.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import ColumnElement, case, select, union_all

from zcore.errors import FieldError, InvalidRequest, NotFound
from zcore.jobs import leftovers, queries
from zcore.jobs.database import Transaction
from zcore.jobs.models import Input, Job, Output
from zcore.jobs.states import State
from zcore.request import INPUT_FIELDS, GenerationRequest, JobOutput, Upload, parse_input_address
from zcore.storage_keys import new_upload_key

# By the end of this delay, a submission that found its upload just before it expired has committed its job.
DELETION_DELAY = timedelta(minutes=1)
STORING_TIME = timedelta(minutes=10)
"""How long storing an upload may take: several times as long as storage may take for one request."""


@dataclass(frozen=True, slots=True)
class UploadedImage:
    """Properties of an uploaded image. `sha256` is the SHA-256 of its bytes in hexadecimal."""

    sha256: str
    format: str
    width: int
    height: int
    bytes: int


def record(transaction: Transaction, owner: str, image: UploadedImage) -> Input:
    """Record an upload whose bytes are about to be stored under the `storage_key` of the row that is returned.

    The row of an earlier upload of the same bytes is used again, and so is its key. Maintenance deletes neither the row
    nor the bytes within the next ten minutes, and both after that unless `mark_stored` is called.
    """
    statement = transaction.insert(Input).values(
        owner=owner,
        sha256=image.sha256,
        format=image.format,
        width=image.width,
        height=image.height,
        bytes=image.bytes,
        expires_at=transaction.now + STORING_TIME,
        storage_key=new_upload_key(owner, image.sha256),
    )
    later = case(
        (Input.expires_at < statement.excluded.expires_at, statement.excluded.expires_at), else_=Input.expires_at
    )
    # Waits for a transaction that is deleting the row, and then inserts it, with a new key.
    recorded = statement.on_conflict_do_update(
        index_elements=[Input.owner, Input.sha256], set_={"expires_at": later}
    ).returning(Input)
    return transaction.session.scalars(recorded, execution_options={"populate_existing": True}).one()


def mark_stored(transaction: Transaction, upload: Input, retention_s: float) -> Input | None:
    """Record that the bytes of an upload are stored, and return its row.

    It expires `retention_s` seconds from now, or at the later time that an earlier upload of the bytes set. Returns
    None if maintenance has deleted the row in the meantime, because storing took too long; the bytes will be deleted.
    """
    key = (upload.owner, upload.sha256)
    row = transaction.session.get(Input, key, with_for_update=True, populate_existing=True)
    if row is None or row.storage_key != upload.storage_key:
        leftovers.add_object(transaction, upload.storage_key)
        return None
    row.stored_at = transaction.now
    row.expires_at = max(row.expires_at, transaction.now + timedelta(seconds=retention_s))
    return row


def find(transaction: Transaction, owner: str, sha256: str) -> Input | None:
    """Return an upload whose bytes are stored; None if there is none."""
    row = transaction.session.get(Input, (owner, sha256))
    return row if row is not None and row.stored_at is not None else None


def is_past_retention(transaction: Transaction) -> ColumnElement[bool]:
    """Return the condition that the time of an upload is over."""
    return Input.expires_at <= transaction.time(-DELETION_DELAY.total_seconds())


def expire(transaction: Transaction, limit: int) -> list[str]:
    """Delete the rows of up to `limit` expired uploads, record their objects for deletion, and return their keys.

    One that a queued or running job uses expires again now, so that it is looked at again after the delay.
    """
    statement = (
        select(Input)
        .where(is_past_retention(transaction))
        .order_by(Input.expires_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    expired = transaction.session.scalars(statement).all()
    used = _used(transaction, expired)
    unused = [upload for upload in expired if upload not in used]
    for upload in used:
        upload.expires_at = transaction.now
    for upload in unused:
        transaction.session.delete(upload)
        leftovers.add_object(transaction, upload.storage_key)
    return [upload.storage_key for upload in unused]


def check(transaction: Transaction, request: GenerationRequest, owner: str) -> None:
    """Raise `InvalidRequest` if the request names an upload or an image of a job that does not exist for this owner."""
    errors: list[FieldError] = []
    for name in INPUT_FIELDS:
        address: str | None = getattr(request, name)
        problem = _problem(transaction, address, owner) if address is not None else None
        if problem is not None:
            errors.append(FieldError(f"/{name}", problem))
    if errors:
        raise InvalidRequest(errors)


def output_of_job(transaction: Transaction, job_id: uuid.UUID, position: int, owner: str) -> Output:
    """Return an image of this owner's job. Raises `NotFound` if the job or the image does not exist."""
    job = queries.get(transaction, job_id, owner)
    if job.status == State.EXPIRED:
        raise NotFound(f"the images of job {job_id} were deleted after their retention time")
    if job.status != State.SUCCEEDED:
        raise NotFound(f"job {job_id} is {job.status}; only a succeeded job has images")
    return queries.output(transaction, job_id, position, owner)[1]


def _used(transaction: Transaction, uploads: Sequence[Input]) -> list[Input]:
    """Return those of these uploads that a queued or running job names."""
    addresses = {(upload.owner, str(Upload(upload.sha256))): upload for upload in uploads}
    owners, texts = ({key[part] for key in addresses} for part in (0, 1))
    statements = (
        select(Job.owner, address).where(Job.stored_status == State.QUEUED, Job.owner.in_(owners), address.in_(texts))
        for address in (Job.request[name].as_string() for name in INPUT_FIELDS)
    )
    named = transaction.session.execute(union_all(*statements)) if uploads else ()
    return [addresses[key] for key in {(owner, address) for owner, address in named} if key in addresses]


def _problem(transaction: Transaction, address: str, owner: str) -> str | None:
    """Return what is wrong with an address; None if nothing is, or if only the worker can find out."""
    match parse_input_address(address):
        case Upload(sha256):
            row = find(transaction, owner, sha256)
            if row is None:
                return "there is no such upload; POST the image to /api/inputs first"
            if row.expires_at <= transaction.now:
                return f"expired at {row.expires_at:%Y-%m-%d %H:%M:%S} UTC; POST the image to /api/inputs again"
        case JobOutput(job_id, index):
            try:
                output_of_job(transaction, job_id, index, owner)
            except NotFound as error:
                return error.message
        case _:
            pass
    return None
