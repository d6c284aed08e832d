"""One line of a terminal that says how far a picture is.

Takes a stream and the pipeline's progress; draws over its own line, and nothing at all where the stream is no terminal.
"""

import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from zcore.imaging.pipeline import Progress

WIDTH = 24
TO_LINE_START = "\r\x1b[K"  # and clear the line


class ProgressLine:
    """`[########................] 3/9 denoise  1.2 s`. In a `with`: the line is gone at its end."""

    def __init__(self, stream: TextIO, pictures: int) -> None:
        self._stream = stream
        self._pictures = pictures
        self._picture = 0
        self._shown = stream.isatty()
        self._began = time.monotonic()

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *_fault: object) -> None:
        self.say("")

    def say(self, text: str) -> None:
        """This text in place of the last."""
        if self._shown:
            self._stream.write(f"{TO_LINE_START}{text}")
            self._stream.flush()

    def begin(self, picture: int) -> None:
        """The next picture begins, counted from 1."""
        self._picture = picture
        self._began = time.monotonic()

    def step(self, progress: "Progress") -> None:
        """What the pipeline tells."""
        done = "#" * round(WIDTH * progress.step / progress.steps)
        which = f"{self._picture} of {self._pictures} " if self._pictures > 1 else ""
        spent_s = time.monotonic() - self._began
        self.say(f"{which}[{done:.<{WIDTH}}] {progress.step}/{progress.steps} {progress.phase}  {spent_s:.1f} s")
