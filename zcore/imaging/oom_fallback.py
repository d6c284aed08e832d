"""Out-of-memory fallback: how one generation continues when its device runs out of memory.

Runs a piece of work; whenever it runs out of memory, takes the next fallback step that may help and runs the work again
from its start. The steps are fewer images per forward, the VAE in tiles, and the text encoder off its device. An
`OomFallback` belongs to one generation, so the next generation starts without fallback. Does not know what the work is.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import torch

from zcore.errors import OutOfMemory
from zcore.foreign_text import first_line
from zcore.imaging.network.tiling import Tiling
from zcore.imaging.prompt_encoder import PromptEncoder

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FallbackStep:
    """A fallback step that was taken, with a description for people; `event` is its type on a job's timeline."""

    kind: Literal["batch_split", "vae_tiled", "encoder_unloaded", "vae_float32"]
    description: str
    event: Literal["oom_fallback", "precision_fallback"] = "oom_fallback"


OnFallback = Callable[[FallbackStep], None]
_TryStep = Callable[[], FallbackStep | None]
"""Takes a fallback step; None if there is none left, or none that would help."""


class OomFallback:
    """The fallback steps of one generation: what is still available, and what was taken."""

    def __init__(
        self,
        subject: str,
        on_fallback: OnFallback,
        *,
        encoder: PromptEncoder | None = None,
        batch_size: int = 1,
        tiling: Tiling | None = None,
        start_tiled: bool = False,
    ) -> None:
        """`subject` is what `OutOfMemory` reports as too large.

        With `start_tiled` the VAE works in tiles from the start, otherwise once it has to; without a `tiling`, never.
        """
        self._subject = subject
        self._on_fallback = on_fallback
        self._encoder = encoder
        self._batch_size = batch_size
        self._next_tiling = tiling
        self._tiling: Tiling | None = None
        self._taken: list[FallbackStep] = []
        self.used_tiling: Tiling | None = None
        """The smallest tiles that the VAE has worked in; None if it has always worked in one piece."""
        if start_tiled:
            self._advance_tiling()

    def run(self, work: Callable[[], T], device: torch.device) -> T:
        """Run work that no fallback step helps, such as the text encoder's own.

        Like all the following methods, raises `OutOfMemory` if memory runs out and no step is left.
        """
        return self._with_fallback(work, device)

    def load(self, work: Callable[[], T], device: torch.device) -> T:
        """Run work that brings weights to a device."""
        return self._with_fallback(work, device, partial(self._unload_encoder, device))

    def generate(self, work: Callable[[int], T], remaining: int, device: torch.device) -> T:
        """Run `work` on the first of the `remaining` images. Its argument is the number of images in one forward."""
        self._batch_size = min(self._batch_size, remaining)
        steps = (self._split_batch, partial(self._unload_encoder, device))
        return self._with_fallback(lambda: work(self._batch_size), device, *steps)

    def run_vae(
        self, work: Callable[[Tiling | None], T], size_px: tuple[int, int], fits: bool, device: torch.device
    ) -> T:
        """Run the VAE on an image of this width and height. `work` is passed the tiles, or None for one piece.

        If `fits` is false, the image is processed in tiles without trying one piece first.
        """
        if self._tiling is None and not fits:
            self._advance_tiling()
        steps = (partial(self._shrink_tiles, *size_px), partial(self._unload_encoder, device))
        done = self._with_fallback(lambda: work(self._tiling), device, *steps)
        if self._tiling and self._tiling.divides(*size_px):
            self.used_tiling = self._tiling
        return done

    def _with_fallback(self, work: Callable[[], T], device: torch.device, *steps: _TryStep) -> T:
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                reason = first_line(error)
            # The failed frames, and the tensors that they hold, are freed only here, outside `except`.
            gc.collect()
            torch.cuda.empty_cache()
            taken = next((step for try_step in steps if (step := try_step())), None)
            if taken is None:
                tried = "; ".join(step.description for step in self._taken)
                after = f" after fallback ({tried})" if tried else ""
                raise OutOfMemory(f"{self._subject} does not fit in the memory of {device}{after}: {reason}")
            self._taken.append(taken)
            self._on_fallback(taken)

    def _split_batch(self) -> FallbackStep | None:
        tried = self._batch_size
        if tried == 1:
            return None
        self._batch_size = tried // 2
        per_forward = "1 image" if self._batch_size == 1 else f"{self._batch_size} images"
        return FallbackStep("batch_split", f"{per_forward} per forward instead of {tried}")

    def _shrink_tiles(self, width_px: int, height_px: int) -> FallbackStep | None:
        """Use tiles that are smaller than before and smaller than the image."""
        while self._next_tiling:
            self._advance_tiling()
            if self._tiling and self._tiling.divides(width_px, height_px):
                return FallbackStep("vae_tiled", f"the VAE works in tiles of {self._tiling}")
        return None

    def _unload_encoder(self, device: torch.device) -> FallbackStep | None:
        """Free the text encoder's memory on this device; it is loaded again when it next encodes."""
        if self._encoder is None or not _are_same(self._encoder.device, device) or not self._encoder.unload():
            return None
        return FallbackStep("encoder_unloaded", f"the text encoder was unloaded from {device}")

    def _advance_tiling(self) -> None:
        self._tiling = self._next_tiling
        self._next_tiling = self._tiling and self._tiling.halved()


def _are_same(first: torch.device, second: torch.device) -> bool:
    """Compare two devices; `cuda` without an index is the first CUDA device."""
    return (first.type, first.index or 0) == (second.type, second.index or 0)
