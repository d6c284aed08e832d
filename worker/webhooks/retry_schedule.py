"""Delay before the next delivery attempt, from the schedule and the receiver's response."""

import random
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

JITTER = 0.1
MAX_RETRY_AFTER_S = 86_400.0
GONE = 410
RETRY_AFTER_STATUSES = (429, 503)


def retry_delay_s(
    attempt: int, status_code: int | None, retry_after: str | None, schedule_s: Sequence[float]
) -> float | None:
    """Return the seconds until the attempt after number `attempt`, or None if there is no further one.

    `status_code` is None if no response arrived. 410 ends the attempts. With 429 and 503,
    `retry_after` may request a longer delay, up to one day. A scheduled delay is varied by up to 10 %.
    """
    if status_code == GONE or attempt > len(schedule_s):
        return None
    scheduled_s = schedule_s[attempt - 1] * random.uniform(1 - JITTER, 1 + JITTER)
    requested_s = _retry_after_s(retry_after) if status_code in RETRY_AFTER_STATUSES else 0.0
    return max(scheduled_s, min(requested_s, MAX_RETRY_AFTER_S))


def _retry_after_s(value: str | None) -> float:
    """Parse a Retry-After header (RFC 9110), a number of seconds or a date. Return 0 if it is neither."""
    if value is None:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(value)
        return max(0.0, (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):
        return 0.0
