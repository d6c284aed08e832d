"""The tree of errors that this product raises deliberately.

    ZImageError
    ├── ConfigurationError        a setting, a profile or the settings file is wrong
    ├── InvalidRequest            the caller's input is not valid
    │   ├── PromptTooLong         the prompt has more tokens than the model has positions for
    │   ├── InvalidEmbedding      a file or value is not a readable prompt embedding
    │   │   └── EmbeddingMismatch the embedding was made for another model
    │   ├── InvalidLora           a LoRA file has unrecognized tensors, or does not fit the model
    │   └── KeyReused             the Idempotency-Key was used with another body
    ├── NotFound                  the named resource does not exist
    ├── Gone                      the named resource existed and was purged
    ├── Conflict                  the job's state does not allow the operation
    ├── Unauthorized              the API key is missing or wrong
    │   └── SignedOut             an admin page needs a session
    ├── TooManyWrongKeys          too many wrong keys came from this address, or from all
    ├── InvalidLink               a signed link was altered or has expired
    ├── ForbiddenAddress          a URL leads to an address that this service must not reach
    │   └── UnknownHost           the host name of a URL has no address
    ├── CheckpointError           the model cannot be loaded as configured
    ├── EmbeddingLost             a job's stored embedding is missing or does not fit
    ├── InputUnavailable          an input of the request cannot be fetched
    ├── OutOfMemory               the accelerator ran out of memory
    ├── NonFiniteValues           a generation computed NaN or infinity
    ├── SigningError              an image could not be signed
    ├── AttemptStalled            an attempt made no progress within its time
    ├── StorageError              the object store failed to read or write an object
    └── Interruption              stops a running generation; a signal, not a failure
        ├── GenerationCanceled    the caller canceled the job
        ├── GenerationReleased    this worker is shutting down; another takes the job
        └── LeaseLost             another worker holds the job's lease

Does not know HTTP: `server.problems` maps these classes to status codes.
"""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from zcore.foreign_text import shortened

Where = Literal["body", "query", "header", "path"]
"""The part of a request that an error is about."""
MAX_REPORTED_ERRORS = 50
MAX_POINTER_CHARACTERS = 200
MAX_DETAIL_CHARACTERS = 1000
MAX_COMPARED_CHARACTERS = 100
"""The longest name that `did_you_mean` compares; no known name is nearly as long."""


class ZImageError(Exception):
    """Base of all deliberate errors.

    `code` is a stable identifier for programs; `retryable` says whether the same work may succeed later.
    """

    code: ClassVar[str] = "internal_error"
    retryable: bool = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigurationError(ZImageError):
    """A setting is unknown, malformed or cannot be satisfied."""

    code = "invalid_configuration"


def did_you_mean(
    name: str, known: Iterable[str], at_most: int = 1, compare: Callable[[str], str] = str.casefold
) -> str:
    """Return `; did you mean ...?` with up to `at_most` known names that resemble `name`; empty if none does.

    `compare` maps a name to the form in which names are compared.
    """
    if len(name) > MAX_COMPARED_CHARACTERS:
        return ""
    by_form = {compare(one): one for one in known}
    near = difflib.get_close_matches(compare(name), by_form, n=at_most)
    return f"; did you mean {' or '.join(f'`{by_form[form]}`' for form in near)}?" if near else ""


@dataclass(frozen=True, slots=True)
class FieldError:
    """One invalid field; `pointer` is a JSON pointer (RFC 6901) into the request's body, such as `/width`.

    If `where` is not the body, the pointer is a slash and the name of the header or of the part of the URL.
    """

    pointer: str
    detail: str
    where: Where = "body"


class InvalidRequest(ZImageError):
    """The request is not valid; `errors` lists every invalid field, not only the first.

    Names and values that a caller chose appear in them, so their number and lengths are bounded.
    """

    code = "invalid_request"

    def __init__(self, errors: list[FieldError]) -> None:
        self.errors = [_bounded(error) for error in errors[:MAX_REPORTED_ERRORS]]
        if (unlisted := len(errors) - MAX_REPORTED_ERRORS) > 0:
            self.errors.append(FieldError("", f"{unlisted} more errors are not listed"))
        named = [f"{name}: {error.detail}" if (name := error.pointer[1:]) else error.detail for error in self.errors]
        super().__init__("; ".join(named))

    @classmethod
    def field(cls, name: str, detail: str, where: Where = "body") -> Self:
        """Return the error of a single field."""
        return cls([FieldError(f"/{name}", detail, where)])


def _bounded(error: FieldError) -> FieldError:
    pointer = shortened(error.pointer, MAX_POINTER_CHARACTERS)
    return FieldError(pointer, shortened(error.detail, MAX_DETAIL_CHARACTERS), error.where)


class PromptTooLong(InvalidRequest):
    """The formatted prompt has more tokens than the transformer has positions for."""

    code = "prompt_too_long"


class InvalidEmbedding(InvalidRequest):
    """A file or value is not a prompt embedding that this version can read."""

    code = "invalid_embedding"


class EmbeddingMismatch(InvalidEmbedding):
    """The prompt embedding was made for another model and cannot condition this one."""

    code = "embedding_mismatch"


class InvalidLora(InvalidRequest):
    """A LoRA file has unrecognized tensors, or was made for another model."""

    code = "invalid_lora"


class KeyReused(InvalidRequest):
    """The Idempotency-Key was already used with another body in the last 24 hours."""

    code = "idempotency_key_reused"


class NotFound(ZImageError):
    """The named resource does not exist."""

    code = "not_found"


class Gone(ZImageError):
    """The named resource existed and was purged after its retention time."""

    code = "gone"


class Conflict(ZImageError):
    """The state of the job, or of another resource, does not allow the operation."""

    code = "conflict"


class Unauthorized(ZImageError):
    """The API key is missing or wrong."""

    code = "unauthorized"


class SignedOut(Unauthorized):
    """An admin page was requested without a session."""

    code = "signed_out"


class TooManyWrongKeys(ZImageError):
    """Too many different wrong keys were presented within a minute; `wait_s` is the time until the next attempt."""

    code = "too_many_wrong_keys"
    retryable = True

    def __init__(self, wait_s: int) -> None:
        super().__init__(f"too many wrong keys were presented; try again in {wait_s} s")
        self.wait_s = wait_s


class ForbiddenAddress(ZImageError):
    """A URL leads to an address that this service must not reach."""

    code = "forbidden_address"


class UnknownHost(ForbiddenAddress):
    """The host name of a URL is not valid, or has no address at the moment."""

    code = "unknown_host"
    retryable = True


class InvalidLink(ZImageError):
    """A signed link to an object was altered or has expired."""

    code = "invalid_link"


class CheckpointError(ZImageError):
    """The model cannot be loaded as configured: the folder, one of its files, or the device is unsuitable."""

    code = "model_unavailable"


class EmbeddingLost(ZImageError):
    """The embedding that another worker stored for a job is missing, or was made for another model."""

    code = "embedding_lost"
    retryable = True


class InputUnavailable(ZImageError):
    """An input of the request cannot be fetched: an upload or image is gone, or its server does not deliver it.

    `field` is `image`, `mask` or `loras`. `retryable` is set per instance.
    """

    code = "input_unavailable"

    def __init__(self, field: str, detail: str, *, retryable: bool = False) -> None:
        super().__init__(f"{field}: {detail}")
        self.retryable = retryable


class OutOfMemory(ZImageError):
    """The accelerator ran out of memory for this image."""

    code = "gpu_out_of_memory"


class NonFiniteValues(ZImageError):
    """A generation computed NaN or infinity, which would become black or noisy pixels."""

    code = "non_finite_values"


class SigningError(ZImageError):
    """An image could not be signed, and an unsigned one must not be delivered where signing is configured."""

    code = "signing_failed"
    retryable = True


class AttemptStalled(ZImageError):
    """The attempt made no progress within its time, or was not finished by its deadline."""

    code = "stalled"
    retryable = True


class Overloaded(ZImageError):
    """Too much work of one kind is waiting already; the same request may succeed a few seconds later."""

    code = "overloaded"
    retryable = True


class StorageError(ZImageError):
    """The object store failed to read or write an object, after the client's retries."""

    code = "storage_unavailable"
    retryable = True


class Interruption(ZImageError):
    """Raised from a progress callback to stop a generation between two steps."""

    code = "interrupted"
    retryable = True


class GenerationCanceled(Interruption):
    """The caller canceled the job."""

    code = "canceled"


class GenerationReleased(Interruption):
    """This worker is shutting down; the job returns to the queue without an attempt counted."""

    code = "released"


class LeaseLost(Interruption):
    """Another worker holds the job's lease; this worker must not write any result."""

    code = "lease_lost"
