"""Stall detection: how long a part of the work on a job may take, learned from how long it took before.

No threads, no database: `Heartbeat` asks `StallWatch` a few times a second. Safe to share between threads.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import StrEnum

from zcore.request import GenerationRequest

REMEMBERED_SHAPES = 1000


class Phase(StrEnum):
    """Part of an attempt; the three in the middle are those of a generation's progress."""

    WAIT = "wait"  # for uploads of other jobs
    FETCH = "fetch"  # inputs and LoRAs
    ENCODE = "encode"
    DENOISE = "denoise"  # one step
    DECODE = "decode"
    WRITE_IMAGE = "write_image"
    UPLOAD = "upload"
    COMPLETE = "complete"


MEASURED = frozenset({Phase.ENCODE, Phase.DENOISE, Phase.DECODE, Phase.WRITE_IMAGE})
"""Phases whose duration depends on the request and this machine, not on other services."""


def shape_of(request: GenerationRequest) -> Hashable:
    """Return what decides how long the measured phases of a request take, in coarse terms."""
    texts = (request.prompt, request.negative_prompt, request.system_prompt, request.thinking_content)
    return (
        request.width,
        request.height,
        request.n,
        request.format,
        request.guidance_scale > 0,
        request.tiled_vae,
        len(request.passes or ()),
        tuple(getattr(request, name) is not None for name in ("image", "slg", "dype")),
        tuple(sorted(use.name for use in request.loras)),
        sum(len(text or "") for text in texts).bit_length(),
    )


class PhaseBudgets:
    """The time that each phase may take for each shape of request."""

    def __init__(self, floor_s: float, least_s: float, factor: float) -> None:
        """A phase that was measured may take `factor` times its slowest time, and at least `least_s` seconds.

        Any other may take `floor_s` seconds.
        """
        self._floor_s = floor_s
        self._least_s = least_s
        self._factor = factor
        self._slowest_s: OrderedDict[tuple[Hashable, Phase], float] = OrderedDict()
        self._lock = threading.Lock()

    def observe(self, shape: Hashable, phase: Phase, duration_s: float) -> None:
        """Learn from a phase that ended. The first time of a shape is not counted: it may include a compilation."""
        if phase not in MEASURED:
            return
        with self._lock:
            slowest_s = self._slowest_s.pop((shape, phase), None)
            self._slowest_s[shape, phase] = 0.0 if slowest_s is None else max(slowest_s, duration_s)
            if len(self._slowest_s) > REMEMBERED_SHAPES:
                self._slowest_s.popitem(last=False)

    def budget_s(self, shape: Hashable, phase: Phase) -> float:
        """Return how long this phase may take, in seconds."""
        with self._lock:
            slowest_s = self._slowest_s.get((shape, phase), 0.0)
        return max(self._least_s, self._factor * slowest_s) if slowest_s else self._floor_s


@dataclass(frozen=True, slots=True)
class _Entered:
    phase: Phase
    at: float
    excused_s: float  # of the attempt, when the phase began


class StallWatch:
    """Timer of one attempt. One thread works and calls `enter`; another asks `stalled`."""

    def __init__(self, budgets: PhaseBudgets, deadline_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`deadline_s` bounds the whole attempt, in seconds."""
        self._budgets = budgets
        self._shape: Hashable | None = None
        self._deadline_s = deadline_s
        self._clock = clock
        self._began_at = clock()
        self._excused_s = 0.0
        self._entered = _Entered(Phase.WAIT, self._began_at, 0.0)

    def enter(self, phase: Phase) -> None:
        """Begin a phase, or the next step of the same one."""
        ended, now = self._entered, self._clock()
        self._entered = _Entered(phase, now, self._excused_s)
        if self._shape is not None:
            self._budgets.observe(self._shape, ended.phase, now - ended.at)

    def excuse(self, seconds: float) -> None:
        """Count this time neither against the phase nor against the attempt: a service was away."""
        self._excused_s += seconds

    def expect(self, shape: Hashable | None) -> None:
        """Expect the times of earlier requests of this shape from now on; None if no earlier time says anything."""
        self._shape = shape

    @property
    def needs_storage(self) -> bool:
        """Whether the current phase cannot go on while storage is away."""
        return self._entered.phase in (Phase.WAIT, Phase.FETCH, Phase.UPLOAD)

    def stalled(self) -> str | None:
        """Return what has taken too long, in words; None while everything is within its budget."""
        entered, now = self._entered, self._clock()
        budget_s = self._budgets.budget_s(self._shape, entered.phase)  # no times are known for the shape None
        if now - entered.at - (self._excused_s - entered.excused_s) > budget_s:
            return f"the phase `{entered.phase}` made no progress for {budget_s:.0f} s"
        if now - self._began_at - self._excused_s > self._deadline_s:
            return f"the attempt was not finished within {self._deadline_s:.0f} s"
        return None
