"""Where a job's pictures lie in storage: decided by job, attempt and index, so that two attempts never write the same
object, and what a lost attempt left is known without listing.
"""

import uuid
from collections.abc import Iterable


def key_of(job_id: uuid.UUID, attempt: int, index: int) -> str:
    """The key of picture `index` (from 0) that attempt `attempt` (from 1) paints."""
    return f"jobs/{job_id}/{attempt}-{index}.png"


def keys_of(job_id: uuid.UUID, attempts: Iterable[int], pictures: int) -> list[str]:
    """Every key that these attempts at `pictures` pictures may have written."""
    return [key_of(job_id, attempt, index) for attempt in attempts for index in range(pictures)]
