"""Report the result of a benchmark: samples as median and spread, everything as one JSON object."""

import json
import os
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Return median, p99 and extremes of at least two samples, rounded to three decimal places."""
    ordered = sorted(samples)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * (len(ordered) - 1)))]
    found = {"p50": statistics.median(ordered), "p99": p99, "min": ordered[0], "max": ordered[-1]}
    return {name: round(value, 3) for name, value in found.items()}


def report(question: str, **results: Any) -> None:
    """Print the results and the machine as one line of JSON."""
    load = f"{os.getloadavg()[0]:.1f}"
    result = {
        "question": question,
        "at": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {load}, Python {platform.python_version()}",
        **results,
    }
    print("\n" + json.dumps(result))
