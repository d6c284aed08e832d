"""Every error this product raises on purpose, as one tree.

    ZImageError
    ├── ConfigurationError        a setting, profile or file of settings is wrong
    ├── InvalidRequest            the caller's input is outside its bounds
    │   ├── PromptTooLong         the prompt has more tokens than the model can place
    │   ├── EmbeddingMismatch     a prompt's embedding was made for another model
    │   ├── InvalidLora           a LoRA file is not understood whole, or does not fit the model
    │   └── KeyReused             the Idempotency-Key belongs to another body
    ├── NotFound                  the thing named does not exist
    ├── Gone                      it existed, and was purged
    ├── Conflict                  the job's state does not allow what was asked
    ├── Unauthorized              no key, or a wrong one
    ├── InvalidLink               a signed link is tampered with or too old
    ├── CheckpointError           the model cannot be loaded as configured
    ├── EmbeddingLost             a job's stored embedding is not there, or does not fit
    ├── InputUnavailable          what the request starts from cannot be had
    ├── OutOfMemory               the accelerator's memory did not suffice
    ├── StorageError              the object store did not take or give an object
    └── Interruption              a running generation was asked to stop; says how, not a fault
        ├── GenerationCanceled    the caller wants it no more
        ├── GenerationHandedBack  this worker is going away; another takes the job
        └── LeaseLost             the job belongs to another worker by now

Takes nothing, gives types. Does not know HTTP: `server.problems` maps these to status codes.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Self


class ZImageError(Exception):
    """Base of all deliberate errors.

    `code` is stable for machines, `retryable` says whether the same work may succeed later.
    """

    code: ClassVar[str] = "internal_error"
    retryable: bool = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigurationError(ZImageError):
    """A setting is unknown, malformed or asks for what cannot be."""

    code = "invalid_configuration"


def did_you_mean(name: str, known: Iterable[str], at_most: int = 1) -> str:
    """What to add to a refusal of an unknown name: `; did you mean ...?`, or nothing where no known one is like it."""
    near = difflib.get_close_matches(name, list(known), n=at_most)
    return f"; did you mean {' or '.join(f'`{one}`' for one in near)}?" if near else ""


@dataclass(frozen=True, slots=True)
class FieldError:
    """One field that is wrong. `pointer` is a JSON pointer (RFC 6901) into the request's body, as in `/width`."""

    pointer: str
    detail: str


class InvalidRequest(ZImageError):
    """The request is outside its bounds; `errors` names every field that is, not only the first."""

    code = "invalid_request"

    def __init__(self, errors: list[FieldError]) -> None:
        super().__init__("; ".join(f"{error.pointer.removeprefix('/')}: {error.detail}" for error in errors))
        self.errors = errors

    @classmethod
    def field(cls, name: str, detail: str) -> Self:
        """The common case: one field is wrong."""
        return cls([FieldError(f"/{name}", detail)])


class PromptTooLong(InvalidRequest):
    """The formatted prompt has more tokens than the transformer can place."""

    code = "prompt_too_long"


class EmbeddingMismatch(InvalidRequest):
    """The embedding of a prompt was made for another model, and cannot condition this one."""

    code = "embedding_mismatch"


class InvalidLora(InvalidRequest):
    """A LoRA file is not understood to its last tensor, or was made for another model."""

    code = "invalid_lora"


class KeyReused(InvalidRequest):
    """The Idempotency-Key was already used with another body in the last 24 hours."""

    code = "idempotency_key_reused"


class NotFound(ZImageError):
    """The thing named does not exist."""

    code = "not_found"


class Gone(ZImageError):
    """The thing named existed and was purged after its retention time."""

    code = "gone"


class Conflict(ZImageError):
    """The job's state does not allow what was asked."""

    code = "conflict"


class Unauthorized(ZImageError):
    """The caller gave no key, or a wrong one."""

    code = "unauthorized"


class InvalidLink(ZImageError):
    """A signed link to an object is tampered with, or older than its expiry."""

    code = "invalid_link"


class CheckpointError(ZImageError):
    """The model cannot be loaded as configured: the folder, a file in it, or the device is not what it has to be."""

    code = "model_unavailable"


class EmbeddingLost(ZImageError):
    """The embedding that another worker stored for a job is not in storage, or is not one of this model."""

    code = "embedding_lost"
    retryable = True


class InputUnavailable(ZImageError):
    """What the request starts from cannot be had: an upload or a picture is gone, or a server does not give it.

    `field` is `image`, `mask` or `loras`. Each says by itself whether it may be had later.
    """

    code = "input_unavailable"

    def __init__(self, field: str, detail: str, *, retryable: bool = False) -> None:
        super().__init__(f"{field}: {detail}")
        self.retryable = retryable


class OutOfMemory(ZImageError):
    """The accelerator's memory did not suffice for this picture."""

    code = "gpu_out_of_memory"


class StorageError(ZImageError):
    """The object store did not take or give an object, after the retries of the client."""

    code = "storage_unavailable"
    retryable = True


class Interruption(ZImageError):
    """Raised out of a progress callback to stop a generation between two steps."""

    code = "interrupted"
    retryable = True


class GenerationCanceled(Interruption):
    """The caller wants the picture no more."""

    code = "canceled"


class GenerationHandedBack(Interruption):
    """This worker is shutting down; the job returns to the queue without an attempt counted."""

    code = "handed_back"


class LeaseLost(Interruption):
    """The job's lease went to another worker; nothing that this one does may be written any more."""

    code = "lease_lost"
