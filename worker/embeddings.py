"""Where a prompt's embedding lies in storage between the worker that encodes and the one that paints: decided by job
and attempt, as its pictures are, so that whatever a lost attempt left is known without listing.
"""

import uuid
from collections.abc import Iterable

CONTENT_TYPE = "application/octet-stream"


def key_of(job_id: uuid.UUID, attempt: int) -> str:
    """The key of the embedding that attempt `attempt` (from 1) stores."""
    return f"jobs/{job_id}/embedding-{attempt}.safetensors"


def keys_of(job_id: uuid.UUID, attempts: Iterable[int]) -> list[str]:
    """Every key that these attempts may have written."""
    return [key_of(job_id, attempt) for attempt in attempts]
