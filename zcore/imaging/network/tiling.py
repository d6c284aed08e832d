"""Tiling: a large result assembled from small tiles that fade into each other.

Takes the sides, a tiling, and a function that computes one tile; returns the result, accumulated in float32 on the CPU.
So the function's device holds one tile at a time, regardless of the total size.

Tiles are a stride apart; the last one is moved back so that it ends at the border. Where two overlap, each fades with
weights (i + .5) / n, and weights are divided by their sum, so they add up to one everywhere. A tile does not fade at
the outer border: a constant stays constant to the last pixel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zcore.checkpoint.geometry import LATENT_PX
from zcore.choices import TILE_OVERLAP_PX, TILE_SIZE_PX, TileOverlap, TileSize
from zcore.errors import ConfigurationError
from zcore.request import mismatches
from zcore.sizes import SIDE_MULTIPLE_PX

SMALLEST_PX = 256
"""The limit for halving tiles: the smaller they are, the more the result differs from one computed in one piece."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """A tile's side and the overlap of neighbours, in pixels: multiples of 16 and of 8.

    Raises `ConfigurationError` for a side or an overlap out of bounds, and an overlap of more than half a tile.
    """

    size_px: int = TILE_SIZE_PX
    overlap_px: int = TILE_OVERLAP_PX

    def __post_init__(self) -> None:
        sides = {"tile_size": (self.size_px, TileSize), "tile_overlap": (self.overlap_px, TileOverlap)}
        faults = [f"{name}: {one.detail}" for name, side in sides.items() for one in mismatches(*side)]
        if faults:
            raise ConfigurationError("; ".join(faults))
        if self.overlap_px > self.size_px // 2:
            largest = self.size_px // 2 // LATENT_PX * LATENT_PX
            raise ConfigurationError(
                f"tile_overlap: {self.overlap_px} px is more than half of tile_size ({self.size_px} px); "
                f"the nearest is {largest}"
            )

    def divides(self, width_px: int, height_px: int) -> bool:
        """Return whether an image of this size has more than one tile; otherwise it is processed in one piece."""
        return max(width_px, height_px) > self.size_px

    def halved(self) -> "Tiling | None":
        """Return tiles of half the side and overlap, or None if they would be too small."""
        if self.size_px < 2 * SMALLEST_PX:
            return None
        half_px = self.size_px // 2 // SIDE_MULTIPLE_PX * SIDE_MULTIPLE_PX
        return Tiling(half_px, self.overlap_px // 2 // LATENT_PX * LATENT_PX)

    def __str__(self) -> str:
        return f"{self.size_px} px, overlapping by {self.overlap_px} px"


@dataclass(frozen=True, slots=True)
class Span:
    """One tile's part of one axis, and its weight at each position there: float32 (stop - start,)."""

    start: int
    stop: int
    shares: Tensor


def spans(length: int, size: int, overlap: int) -> list[Span]:
    """Return the tiles of an axis in order; a single one if `length` is at most `size`. All lengths share a unit."""
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
    """Assemble tiles (channels, rows, columns) of any float dtype to float32 (channels, height, width) on the CPU."""
    whole = torch.zeros(channels, rows[-1].stop, columns[-1].stop)
    for row in rows:
        for column in columns:
            tile = tile_of(row, column).to("cpu", torch.float32)
            whole[:, row.start : row.stop, column.start : column.stop] += tile * row.shares[:, None] * column.shares
    return whole


def _faded(size: int, overlap: int) -> Tensor:
    """Return a tile's weights along an axis: 1 in its middle, less where it overlaps its neighbours."""
    weights = torch.ones(size)
    ramp = (torch.arange(overlap) + 0.5) / max(overlap, 1)
    weights[:overlap] = ramp
    weights[size - overlap :] *= ramp.flip(0)
    return weights
