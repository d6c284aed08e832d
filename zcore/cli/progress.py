"""Progress line on a terminal.

Shows nothing if the stream is not a terminal. The line is removed at the end, whether by success, failure or Ctrl-C.
"""

from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from tqdm import tqdm

if TYPE_CHECKING:
    from zcore.imaging.pipeline import Progress


class ProgressLine:
    """Context manager that shows either a text or the progress of one image."""

    def __init__(self, stream: TextIO, images: int) -> None:
        self._stream = stream
        self._images = images
        self._prefix = ""
        self._bar: tqdm[NoReturn] | None = None

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *_error: object) -> None:
        self.clear()

    def show(self, text: str) -> None:
        """Replace the line by this text."""
        self.clear()
        self._bar = self._new_bar(desc=text, bar_format="{desc}")

    def clear(self) -> None:
        """Remove the line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def begin_image(self, number: int) -> None:
        """Begin image `number` (from 1): its progress bar appears with the next step."""
        self.clear()
        self._prefix = f"image {number} of {self._images}, " if self._images > 1 else ""

    def step(self, progress: "Progress") -> None:
        """Draw the reported progress. The count goes back if an out-of-memory fallback restarts the image."""
        description = f"{self._prefix}{progress.phase}"
        if self._bar is None:
            self._bar = self._new_bar(desc=description, total=progress.steps, unit="step")
        self._bar.n = progress.step
        self._bar.set_description(description)

    def _new_bar(self, **options: Any) -> "tqdm[NoReturn]":
        """Return a bar that clears its line when closed, and stays silent if the stream is not a terminal."""
        return tqdm(file=self._stream, disable=None, leave=False, dynamic_ncols=True, **options)
