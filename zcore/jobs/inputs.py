"""What callers' jobs start from: the record of uploads, and whether the addresses of a request lead to something.

Takes a `Transaction`; the bytes lie in storage under `key_of`, put there after the row and deleted before it, so that
none lies there unrecorded. Only a caller's own uploads and pictures are found. Does not touch storage.
"""

import hashlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import and_, literal, select, tuple_, union_all
from sqlalchemy.exc import IntegrityError

from zcore.errors import FieldError, InvalidRequest, NotFound
from zcore.jobs import queries
from zcore.jobs.database import Transaction
from zcore.jobs.models import Input, Job, Output
from zcore.jobs.states import State
from zcore.request import INPUT_FIELDS, INPUT_ID, OUTPUT_OF_JOB, GenerationRequest

# A submission that found its upload a moment before the end of its time is on record by then.
SPARED = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class UploadedPicture:
    """What an upload turned out to be. `sha256` is of its bytes, in hexadecimal."""

    sha256: str
    format: str
    width: int
    height: int
    bytes: int


def key_of(owner: str, sha256: str) -> str:
    """Where this owner's upload lies in storage; a name of any characters becomes one folder."""
    return f"inputs/{hashlib.sha256(owner.encode()).hexdigest()}/{sha256}"


def keep(transaction: Transaction, owner: str, picture: UploadedPicture, retention_s: float) -> Input:
    """The upload's row, to be kept for `retention_s` seconds from now; one of the same bytes is kept longer.

    Commit it before the bytes are stored: from then on the clock leaves them alone.
    """
    kept = _locked(transaction, owner, picture.sha256)
    if kept is None:
        try:
            with transaction.session.begin_nested():
                kept = Input(
                    owner=owner,
                    sha256=picture.sha256,
                    format=picture.format,
                    width=picture.width,
                    height=picture.height,
                    bytes=picture.bytes,
                    expires_at=transaction.now,
                )
                transaction.session.add(kept)
        except IntegrityError:
            # The same bytes arrived twice at once: the other one won between our look and our insert.
            kept = _locked(transaction, owner, picture.sha256)
            if kept is None:
                raise
    kept.expires_at = max(kept.expires_at, transaction.now + timedelta(seconds=retention_s))
    return kept


def past_retention(transaction: Transaction, at_most: int) -> Sequence[Input]:
    """Uploads whose time is over and that no queued or running job names, locked until the end of the transaction."""
    # Each state by an index of its own: the ended jobs of years are not read through.
    active = (Job.status == State.QUEUED, and_(Job.status == State.RUNNING, Job.lease_until.is_not(None)))
    named = [(state, Job.request[name].as_string()) for state in active for name in INPUT_FIELDS]
    in_use = union_all(*(select(Job.owner, address).where(state, address.is_not(None)) for state, address in named))
    statement = (
        select(Input)
        .where(
            Input.expires_at <= transaction.now - SPARED,
            tuple_(Input.owner, literal("input:") + Input.sha256).not_in(in_use),
        )
        .order_by(Input.expires_at)
        .limit(at_most)
        .with_for_update(skip_locked=True)
    )
    return transaction.session.scalars(statement).all()


def check(transaction: Transaction, request: GenerationRequest, owner: str) -> None:
    """Raises `InvalidRequest` where an upload or a picture that the request names is not there for this owner."""
    faults: list[FieldError] = []
    for name in INPUT_FIELDS:
        address: str | None = getattr(request, name)
        fault = _fault(transaction, address, owner) if address is not None else None
        if fault is not None:
            faults.append(FieldError(f"/{name}", fault))
    if faults:
        raise InvalidRequest(faults)


def picture_of_job(transaction: Transaction, job_id: uuid.UUID, position: int, owner: str) -> Output:
    """A picture that a job of this owner painted. Raises `NotFound`, saying in one sentence what is missing."""
    job = queries.get(transaction, job_id, owner)
    if job.status == State.EXPIRED:
        raise NotFound(f"the pictures of job {job_id} were deleted after their retention time")
    if job.status != State.SUCCEEDED:
        raise NotFound(f"job {job_id} is {job.status}; only a succeeded job has pictures")
    return queries.output(transaction, job_id, position, owner)[1]


def _fault(transaction: Transaction, address: str, owner: str) -> str | None:
    """What is wrong with an address, in one sentence; None where nothing is, or only the worker can know."""
    if upload := INPUT_ID.fullmatch(address):
        kept = transaction.session.get(Input, (owner, upload[1]))
        if kept is None:
            return "is no upload that is still kept; POST it to /api/inputs"
        if kept.expires_at <= transaction.now:
            return f"expired at {kept.expires_at:%Y-%m-%d %H:%M:%S} UTC; POST it to /api/inputs again"
    elif painted := OUTPUT_OF_JOB.fullmatch(address):
        try:
            picture_of_job(transaction, uuid.UUID(painted[1]), int(painted[2]), owner)
        except NotFound as fault:
            return fault.message
    return None


def _locked(transaction: Transaction, owner: str, sha256: str) -> Input | None:
    return transaction.session.get(Input, (owner, sha256), with_for_update=True, populate_existing=True)
