"""Ids of jobs as times and as numbers: UUIDv7, which sort by the time at which they were made."""

import uuid
from datetime import UTC, datetime

FIRST_ID, LAST_ID = uuid.UUID(int=0), uuid.UUID(int=2**128 - 1)
"""All ids are between these two."""


def first_id_at(moment: datetime) -> uuid.UUID:
    """Return the lowest id of that millisecond. A time without a zone is taken as UTC."""
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return nearest_id(int(aware.timestamp() * 1000) << 80)


def nearest_id(number: int) -> uuid.UUID:
    """Return the id that is this number, or the first or the last one if the number is beyond."""
    return uuid.UUID(int=min(max(number, FIRST_ID.int), LAST_ID.int))
