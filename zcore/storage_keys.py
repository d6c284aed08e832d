"""Keys of stored objects.

No key is used again once its object may be deleted, so that whoever deletes an object late deletes no newer one. The
keys of a job are derived from the values of its row (job, attempt, index, format): the objects of a lost attempt are
known without listing a bucket. Those of uploads and LoRAs have a random part, and their rows contain them. Does not
access storage.
"""

import hashlib
import re
import secrets
import uuid
from collections.abc import Iterable

PROBE_KEY = "jobs/probe"
"""Object by which a process learns whether storage answers: it is read at the start, and put and deleted by workers."""

JOBS, UPLOADS, LORAS = "jobs/", "inputs/", "loras/"
"""What the keys of each kind begin with."""

_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_JOB_KEY = re.compile(rf"jobs/({_UUID})/(?:[0-9]+-[0-9]+\.[a-z0-9]+|embedding-[0-9]+\.safetensors)")
# Keys from before each was new have no suffix.
_UPLOAD_KEY = re.compile(r"inputs/[0-9a-f]{64}/[0-9a-f]{64}(?:-[0-9a-f]{16})?")
_LORA_KEY = re.compile(r"loras/[^/]+/[0-9a-f]{64}(?:-[0-9a-f]{16})?\.safetensors")


def output_key(job_id: uuid.UUID, attempt: int, index: int, file_format: str) -> str:
    """Return the key of output `index` (from 0) of attempt `attempt` (from 1); its suffix is the format."""
    return f"jobs/{job_id}/{attempt}-{index}.{file_format}"


def output_name(job_id: uuid.UUID | str, index: int, file_format: str) -> str:
    """Return the name under which callers save output `index` (from 0) of a job."""
    return f"{job_id}-{index}.{file_format}"


def output_keys(job_id: uuid.UUID, attempts: Iterable[int], count: int, file_format: str) -> list[str]:
    """Return every key under which these attempts may have stored one of `count` outputs."""
    return [output_key(job_id, attempt, index, file_format) for attempt in attempts for index in range(count)]


def embedding_key(job_id: uuid.UUID, attempt: int) -> str:
    """Return the key of the prompt embedding that attempt `attempt` (from 1) passes to the generating worker."""
    return f"jobs/{job_id}/embedding-{attempt}.safetensors"


def embedding_keys(job_id: uuid.UUID, attempts: Iterable[int]) -> list[str]:
    """Return every key under which these attempts may have stored an embedding."""
    return [embedding_key(job_id, attempt) for attempt in attempts]


def new_upload_key(owner: str, sha256: str) -> str:
    """Return a new key for an owner's upload with this SHA-256; the owner's name is hashed into one folder name."""
    return f"inputs/{hashlib.sha256(owner.encode()).hexdigest()}/{sha256}-{_new_suffix()}"


def new_lora_key(name: str, sha256: str) -> str:
    """Return a new key for the file of a LoRA that is to be registered."""
    return f"loras/{name}/{sha256}-{_new_suffix()}.safetensors"


def job_of(key: str) -> uuid.UUID | None:
    """Return the job that an output or an embedding with this key belongs to; None for any other key."""
    found = _JOB_KEY.fullmatch(key)
    return uuid.UUID(found[1]) if found else None


def is_upload_key(key: str) -> bool:
    """Return whether this is a key of an upload."""
    return _UPLOAD_KEY.fullmatch(key) is not None


def is_lora_key(key: str) -> bool:
    """Return whether this is a key of a registered LoRA's file."""
    return _LORA_KEY.fullmatch(key) is not None


def _new_suffix() -> str:
    return secrets.token_hex(8)
