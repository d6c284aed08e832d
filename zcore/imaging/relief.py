"""What a generation gives up, rung by rung, where the memory of its device does not suffice.

Takes a piece of work and where it runs; does it, and whenever memory ran out takes the next rung that may help and does
it again from its beginning: fewer pictures at once, the VAE in tiles, the text encoder off its device. Says each rung
that it takes. A ladder is one generation's, so the next one begins with everything. Does not know what the work is.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import torch

from zcore.errors import OutOfMemory
from zcore.imaging.model.tiling import Tiling
from zcore.imaging.prompt_encoder import PromptEncoder

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Relief:
    """A rung that was taken, and what it means in words for a person."""

    rung: Literal["batch_split", "vae_tiled", "encoder_rested"]
    sentence: str


OnRelief = Callable[[Relief], None]
_Rung = Callable[[], Relief | None]
"""Gives up a little more; None where it has nothing to give, or nothing that would help."""


class Ladder:
    """All that one generation may give up, and what is left of it."""

    def __init__(
        self,
        what: str,
        on_relief: OnRelief,
        *,
        encoder: PromptEncoder | None = None,
        batch_size: int = 1,
        tiling: Tiling | None = None,
        in_tiles: bool = False,
    ) -> None:
        """`what` is what `OutOfMemory` says does not fit. The VAE works in tiles from the start where `in_tiles`, else
        as soon as it has to; without a `tiling` it cannot.
        """
        self._what = what
        self._on_relief = on_relief
        self._encoder = encoder
        self._batch_size = batch_size
        self._next_tiling = tiling
        self._tiling: Tiling | None = None
        self._taken: list[Relief] = []
        self.tiles: Tiling | None = None
        """The smallest tiles that anything went through the VAE in; None while nothing did."""
        if in_tiles:
            self._go_to_tiles()

    def attempt(self, work: Callable[[], T], device: torch.device) -> T:
        """Work that no rung helps, such as the text encoder's own.

        As all that follow, it raises `OutOfMemory` where memory runs out and there is nothing left to give up.
        """
        return self._relieved(work, device)

    def load(self, work: Callable[[], T], device: torch.device) -> T:
        """Work that brings weights to a device."""
        return self._relieved(work, device, partial(self._rest_encoder, device))

    def paint(self, work: Callable[[int], T], waiting: int, device: torch.device) -> T:
        """Work on the first of so many `waiting` pictures; it is told how many to take at once."""
        self._batch_size = min(self._batch_size, waiting)
        rungs = (self._split_batch, partial(self._rest_encoder, device))
        return self._relieved(lambda: work(self._batch_size), device, *rungs)

    def code(self, work: Callable[[Tiling | None], T], size_px: tuple[int, int], fits: bool, device: torch.device) -> T:
        """Work of the VAE on a picture of this size, in the tiles that it is told or in one piece.

        What does not fit by calculation goes in tiles without having been tried.
        """
        if self._tiling is None and not fits:
            self._go_to_tiles()
        rungs = (partial(self._divide, *size_px), partial(self._rest_encoder, device))
        done = self._relieved(lambda: work(self._tiling), device, *rungs)
        if self._tiling and self._tiling.divides(*size_px):
            self.tiles = self._tiling
        return done

    def _relieved(self, work: Callable[[], T], device: torch.device, *rungs: _Rung) -> T:
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                reason = str(error).partition("\n")[0]
            # Only here are the failed frames gone, and the tensors with them.
            gc.collect()
            torch.cuda.empty_cache()
            taken = next((relief for rung in rungs if (relief := rung())), None)
            if taken is None:
                though = ", though " + "; ".join(relief.sentence for relief in self._taken) if self._taken else ""
                raise OutOfMemory(f"{self._what} does not fit the memory of {device}{though}: {reason}")
            self._taken.append(taken)
            self._on_relief(taken)

    def _split_batch(self) -> Relief | None:
        tried = self._batch_size
        if tried == 1:
            return None
        self._batch_size = tried // 2
        at_once = "one picture is" if self._batch_size == 1 else f"{self._batch_size} pictures are"
        return Relief("batch_split", f"{at_once} painted at once instead of {tried}")

    def _divide(self, width_px: int, height_px: int) -> Relief | None:
        """Tiles that are smaller than before, and than the picture."""
        while self._next_tiling:
            self._go_to_tiles()
            if self._tiling and self._tiling.divides(width_px, height_px):
                return Relief("vae_tiled", f"the VAE works in tiles of {self._tiling}")
        return None

    def _rest_encoder(self, device: torch.device) -> Relief | None:
        """It comes back by itself when it encodes next."""
        if self._encoder is None or not _are_one(self._encoder.device, device) or not self._encoder.rest():
            return None
        return Relief("encoder_rested", f"the text encoder has left {device}")

    def _go_to_tiles(self) -> None:
        self._tiling = self._next_tiling
        self._next_tiling = self._tiling and self._tiling.halved()


def _are_one(first: torch.device, second: torch.device) -> bool:
    """`cuda` is the first of several."""
    return (first.type, first.index or 0) == (second.type, second.index or 0)
