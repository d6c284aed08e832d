"""The library of LoRAs: which the operator registered, and whether a request names one that is there.

Takes a `Transaction`; a file lies in storage under its name and SHA-256, put there before the row and deleted after it,
so that a name always leads to a file. Does not touch storage, and does not read a file.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from zcore.errors import Conflict, FieldError, InvalidRequest, NotFound, did_you_mean
from zcore.jobs.database import Transaction
from zcore.jobs.models import Lora
from zcore.request import GenerationRequest


@dataclass(frozen=True, slots=True)
class UploadedLora:
    """A file to be registered. `sha256` is of its bytes, in hexadecimal."""

    name: str
    sha256: str
    licence: str
    bytes: int


def key_of(name: str, sha256: str) -> str:
    """Where a file lies in storage: each name has its own, which goes with it."""
    return f"loras/{name}/{sha256}.safetensors"


def check_free(transaction: Transaction, upload: UploadedLora) -> None:
    """Raises `Conflict` where another file has the name."""
    found = find(transaction, upload.name)
    if found is not None:
        _check_same(found, upload)


def register(transaction: Transaction, upload: UploadedLora) -> Lora:
    """The row of a file that lies in storage. The same file again is no error; another of its name is a `Conflict`."""
    found = _locked(transaction, upload.name)
    if found is None:
        try:
            with transaction.session.begin_nested():
                found = Lora(
                    name=upload.name,
                    sha256=upload.sha256,
                    licence=upload.licence,
                    storage_key=key_of(upload.name, upload.sha256),
                    bytes=upload.bytes,
                    created_at=transaction.now,
                )
                transaction.session.add(found)
        except IntegrityError:
            # The name was taken twice at once: the other one won between our look and our insert.
            found = _locked(transaction, upload.name)
            if found is None:
                raise
    _check_same(found, upload)
    return found


def remove(transaction: Transaction, name: str) -> str:
    """Forgets a LoRA. Gives the key of its file, which nothing else names. Raises `NotFound`."""
    found = find(transaction, name)
    if found is None:
        raise NotFound(f"there is no LoRA `{name}`{_near(transaction, name)}")
    transaction.session.delete(found)
    transaction.session.flush()
    return found.storage_key


def find(transaction: Transaction, name: str) -> Lora | None:
    """A LoRA by its name."""
    return transaction.session.get(Lora, name)


def listed(transaction: Transaction) -> Sequence[Lora]:
    """All, by name."""
    return transaction.session.scalars(select(Lora).order_by(Lora.name)).all()


def check(transaction: Transaction, request: GenerationRequest) -> None:
    """Raises `InvalidRequest` for each name in the request that is not registered, naming near ones."""
    faults = [
        FieldError(f"/loras/{index}/name", f"there is no LoRA `{use.name}`{_near(transaction, use.name)}")
        for index, use in enumerate(request.loras)
        if find(transaction, use.name) is None
    ]
    if faults:
        raise InvalidRequest(faults)


def _check_same(found: Lora, upload: UploadedLora) -> None:
    if (found.sha256, found.licence) != (upload.sha256, upload.licence):
        raise Conflict(f"there is another LoRA `{upload.name}`; delete it first, or choose another name")


def _locked(transaction: Transaction, name: str) -> Lora | None:
    return transaction.session.get(Lora, name, with_for_update=True, populate_existing=True)


def _near(transaction: Transaction, name: str) -> str:
    return did_you_mean(name, [lora.name for lora in listed(transaction)], at_most=3)
