"""The library of LoRAs that the operator registered, and the check that the LoRAs of a request are registered.

Takes a `Transaction`. A file is stored, under a new key, before its row is inserted, and deleted after its row is, so
that a registered name always leads to a file. Does not access storage or read files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select

from zcore.errors import Conflict, FieldError, InvalidRequest, NotFound, did_you_mean
from zcore.jobs.database import Transaction
from zcore.jobs.models import Lora
from zcore.request import GenerationRequest


@dataclass(frozen=True, slots=True)
class UploadedLora:
    """A file to register. `sha256` is the SHA-256 of its bytes in hexadecimal; `strict` is that of its row."""

    name: str
    sha256: str
    licence: str
    bytes: int
    strict: bool = True


def find_same(transaction: Transaction, upload: UploadedLora) -> Lora | None:
    """Return the row of this file if it is registered already, and None if its name is free.

    Raises `Conflict` if the name is registered for another file or licence, or with another `strict`.
    """
    found = find(transaction, upload.name)
    if found is not None:
        _check_same(found, upload)
    return found


def register(transaction: Transaction, upload: UploadedLora, storage_key: str) -> Lora:
    """Register a file that is in storage under `storage_key`, and return its row.

    If another upload has registered the same file in the meantime, the row is that one's and has another key. Raises
    `Conflict` as `find_same` does.
    """
    statement = transaction.insert(Lora).values(
        name=upload.name,
        sha256=upload.sha256,
        licence=upload.licence,
        storage_key=storage_key,
        bytes=upload.bytes,
        created_at=transaction.now,
        strict=upload.strict,
    )
    # Changes nothing, but waits for a transaction that is removing the row, and returns the row in any case.
    registering = statement.on_conflict_do_update(index_elements=[Lora.name], set_={"name": Lora.name}).returning(Lora)
    registered = transaction.session.scalars(registering, execution_options={"populate_existing": True}).one()
    _check_same(registered, upload)
    return registered


def remove(transaction: Transaction, name: str) -> str:
    """Remove a LoRA and return the storage key of its file, which no other row uses.

    Raises `NotFound` if it is not registered.
    """
    found = find(transaction, name)
    if found is None:
        raise NotFound(_not_registered(transaction, name))
    transaction.session.delete(found)
    transaction.session.flush()
    return found.storage_key


def find(transaction: Transaction, name: str) -> Lora | None:
    """Return the LoRA with this name; None if it is not registered."""
    return transaction.session.get(Lora, name)


def list_all(transaction: Transaction) -> Sequence[Lora]:
    """Return every registered LoRA, sorted by name."""
    return transaction.session.scalars(select(Lora).order_by(Lora.name)).all()


def check(transaction: Transaction, request: GenerationRequest) -> None:
    """Raise `InvalidRequest` with an error for each LoRA of the request that is not registered."""
    errors = [
        FieldError(f"/loras/{index}/name", _not_registered(transaction, use.name))
        for index, use in enumerate(request.loras)
        if find(transaction, use.name) is None
    ]
    if errors:
        raise InvalidRequest(errors)


def _check_same(found: Lora, upload: UploadedLora) -> None:
    if (found.sha256, found.licence, found.strict) != (upload.sha256, upload.licence, upload.strict):
        raise Conflict(
            f"LoRA `{upload.name}` is already registered with a different file, licence or `strict`;"
            " delete it first, or choose another name"
        )


def _not_registered(transaction: Transaction, name: str) -> str:
    similar = did_you_mean(name, [lora.name for lora in list_all(transaction)], at_most=3)
    return f"there is no LoRA `{name}`{similar}"
