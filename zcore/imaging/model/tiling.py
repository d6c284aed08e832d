"""A large whole out of small tiles: where they lie, and how they fade into each other.

Takes a whole's sides, a tiling and a function that computes one tile; gives the whole, gathered in float32 on the CPU.
So the function's device holds one tile at a time, however large the whole. Does not know what is computed.

Tiles lie a stride apart; the last is moved back until it ends where the whole does. Where two overlap, each fades in
and out by weights (i + .5) / n, and weights are divided by their sum, so they add up to one everywhere. A side at the
whole's own border does not fade: a constant stays a constant to the last pixel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zcore.errors import CheckpointError
from zcore.imaging.geometry import LATENT_PX

SMALLEST_PX = 256
"""No tile is halved to less: the smaller it is, the less it is like one piece."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """Side of a tile and how far neighbours overlap, in pixels, both multiples of 8.

    Raises `CheckpointError` for an overlap of more than half a tile.
    """

    size_px: int = 512
    overlap_px: int = 64

    def __post_init__(self) -> None:
        if self.overlap_px > self.size_px // 2:
            raise CheckpointError(
                f"tile_overlap: {self.overlap_px} px is more than half of tile_size, {self.size_px} px"
            )

    def divides(self, width_px: int, height_px: int) -> bool:
        """Whether such a picture is more than one tile; if not, it goes through as in one piece."""
        return max(width_px, height_px) > self.size_px

    def halved(self) -> "Tiling | None":
        """Tiles of half the side, overlapping by half as much; None where they would be too small."""
        if self.size_px < 2 * SMALLEST_PX:
            return None
        return Tiling(self.size_px // 2 // LATENT_PX * LATENT_PX, self.overlap_px // 2 // LATENT_PX * LATENT_PX)

    def __str__(self) -> str:
        return f"{self.size_px} px, overlapping by {self.overlap_px} px"


@dataclass(frozen=True, slots=True)
class Span:
    """One tile's part of one axis, and its share of each place there: float32 (stop - start,)."""

    start: int
    stop: int
    shares: Tensor


def spans(length: int, size: int, overlap: int) -> list[Span]:
    """The tiles of an axis from first to last; one alone where `length` is at most `size`. All in one unit."""
    if length <= size:
        return [Span(0, length, torch.ones(length))]
    starts = [*range(0, length - size, size - overlap), length - size]
    weights = _faded(size, overlap)
    total = torch.zeros(length)
    for start in starts:
        total[start : start + size] += weights
    return [Span(start, start + size, weights / total[start : start + size]) for start in starts]


def gathered(
    rows: Sequence[Span], columns: Sequence[Span], channels: int, tile_of: Callable[[Span, Span], Tensor]
) -> Tensor:
    """The whole, float32 (channels, height, width) on the CPU, of tiles (channels, rows, columns) of any float type."""
    whole = torch.zeros(channels, rows[-1].stop, columns[-1].stop)
    for row in rows:
        for column in columns:
            tile = tile_of(row, column).to("cpu", torch.float32)
            whole[:, row.start : row.stop, column.start : column.stop] += tile * row.shares[:, None] * column.shares
    return whole


def _faded(size: int, overlap: int) -> Tensor:
    """Weights of a tile along an axis, where it is alone and where it fades."""
    weights = torch.ones(size)
    ramp = (torch.arange(overlap) + 0.5) / max(overlap, 1)
    weights[:overlap] = ramp
    weights[size - overlap :] *= ramp.flip(0)
    return weights
