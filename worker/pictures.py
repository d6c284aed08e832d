"""Where a job's pictures lie in storage: decided by job, attempt, index and format, so that two attempts never write
the same object, and what a lost attempt left is known without listing.
"""

import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from zcore.request import OutputFormat


def format_of(request: Mapping[str, Any]) -> OutputFormat:
    """What a job's request, as its row has it, is stored as. Rows from before there was a choice do not say."""
    return request.get("format", "png")


def key_of(job_id: uuid.UUID, attempt: int, index: int, stored_as: OutputFormat) -> str:
    """The key of picture `index` (from 0) that attempt `attempt` (from 1) paints; it ends with the format's name."""
    return f"jobs/{job_id}/{attempt}-{index}.{stored_as}"


def keys_of(job_id: uuid.UUID, attempts: Iterable[int], pictures: int, stored_as: OutputFormat) -> list[str]:
    """Every key that these attempts at `pictures` pictures may have written."""
    return [key_of(job_id, attempt, index, stored_as) for attempt in attempts for index in range(pictures)]
