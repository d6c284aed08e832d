"""The library of LoRAs: which the operator registered, and whether a request names one that is there.

Takes a `Transaction`; a file lies in storage under its own SHA-256, put there before the row and deleted after it, so
that a name always leads to a file. Does not touch storage, and does not read a file.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select

from zcore.errors import Conflict, FieldError, InvalidRequest, NotFound
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


def key_of(sha256: str) -> str:
    """Where a file lies in storage, whatever it is called."""
    return f"loras/{sha256}.safetensors"


def register(transaction: Transaction, upload: UploadedLora) -> Lora:
    """The row of a file that lies in storage. The same file again is no error; another of its name is a `Conflict`."""
    found = transaction.session.get(Lora, upload.name, with_for_update=True)
    if found is None:
        found = Lora(
            name=upload.name,
            sha256=upload.sha256,
            licence=upload.licence,
            storage_key=key_of(upload.sha256),
            bytes=upload.bytes,
            created_at=transaction.now,
        )
        transaction.session.add(found)
        transaction.session.flush()
    elif (found.sha256, found.licence) != (upload.sha256, upload.licence):
        raise Conflict(f"there is another LoRA `{upload.name}`; delete it first, or choose another name")
    return found


def remove(transaction: Transaction, name: str) -> str | None:
    """Forgets a LoRA. Gives the key of its file where no other name leads there. Raises `NotFound`."""
    found = find(transaction, name)
    if found is None:
        raise NotFound(f"there is no LoRA `{name}`{_near(transaction, name)}")
    transaction.session.delete(found)
    transaction.session.flush()
    is_shared = transaction.session.scalar(select(Lora.name).where(Lora.storage_key == found.storage_key).limit(1))
    return None if is_shared else found.storage_key


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


def _near(transaction: Transaction, name: str) -> str:
    near = difflib.get_close_matches(name, [lora.name for lora in listed(transaction)], n=3)
    return f"; did you mean {' or '.join(f'`{one}`' for one in near)}?" if near else ""
