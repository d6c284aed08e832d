"""Growing pauses between attempts."""

from collections.abc import Iterator, Sequence
from itertools import chain, repeat


def pauses(growing_s: Sequence[float]) -> Iterator[float]:
    """Yield each pause, then the last one without end, in seconds."""
    return chain(growing_s, repeat(growing_s[-1]))
