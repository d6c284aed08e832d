"""Progress of a generation, reported before each step."""

from collections.abc import Callable
from dataclasses import dataclass

from zcore.stages import Phase


@dataclass(frozen=True, slots=True)
class Progress:
    """`step` of `steps` are done, over all images and passes of the request; `phase` is what comes next.

    A forward of several images counts as one step of each. After an out-of-memory fallback `step` returns to the
    value at which the images that are generated again had started.
    """

    phase: Phase
    step: int
    steps: int


OnStep = Callable[[Progress], None]


@dataclass(slots=True)
class ProgressCounter:
    """Counts the steps of one generation and reports them; `forwards` is the number of steps of each image."""

    on_step: OnStep
    images: int
    forwards: int
    done: int = 0

    @property
    def steps(self) -> int:
        """Steps of all images together."""
        return self.images * self.forwards

    def reset_to(self, remaining: int) -> None:
        """Go back to the point where this many images had not been started."""
        self.done = (self.images - remaining) * self.forwards

    def count_step(self, images: int) -> None:
        """Report, then count, a step of this many images."""
        self.report("denoise")
        self.done += images

    def report(self, phase: Phase) -> None:
        """Report what comes next."""
        self.on_step(Progress(phase, self.done, self.steps))
