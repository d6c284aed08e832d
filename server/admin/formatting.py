"""Template filters that format values for people."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any


def timestamp(moment: datetime) -> str:
    """Format a time as `2030-01-31 18:00:00`, in UTC."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def duration(seconds: float) -> str:
    """Format a duration with a precision that suits its size: `18 ms`, `4.2 s`, `3 min 05 s`, `2 h 40 min`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02d} min"


def file_size(size_bytes: int) -> str:
    """Format a size in bytes: `812 B`, `57 kB`, `1.5 MB`."""
    if size_bytes < 1000:
        return f"{size_bytes} B"
    return f"{size_bytes / 1000:.0f} kB" if size_bytes < 1_000_000 else f"{size_bytes / 1_000_000:.1f} MB"


def metric(value: Any, name: str) -> str:
    """Format a metric by the unit at the end of its name: `_ms` or `_mb`."""
    if name.endswith("_ms") and isinstance(value, int | float):
        return duration(value / 1000)
    if name.endswith("_mb") and isinstance(value, int | float):
        return f"{value:,} MB"
    return str(value)


FILTERS: Mapping[str, Callable[..., str]] = {
    "timestamp": timestamp,
    "duration": duration,
    "file_size": file_size,
    "metric": metric,
}
