"""Rotary positions: where a token stands, and by which angles its queries and keys are turned.

Takes places and frequencies; gives tables of cosines and sines, real numbers all the way. Knows nothing of networks:
other frequencies or amplitudes give other tables, for a whole picture or for one step of it.

A token's place is (frame, row, column), and each axis has a share of a head's channels. Caption token k stands at
(1 + k, 0, 0), through its padding; the picture's tokens stand one frame behind the padded caption; the padding of the
picture stands at the origin. RoPE is Su et al. 2021 (arXiv:2104.09864), on neighbouring pairs of channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Rotary:
    """The turns of a row of tokens: for the angle a of each pair of channels (cos a, sin a) and (-sin a, cos a).

    Both are float32 (..., S, head_dim / 2, 2): where the first and the second channel of a pair go.
    """

    first: Tensor
    second: Tensor


def frequencies(theta: float, dims: Sequence[int]) -> list[Tensor]:
    """Radians a place, float64 (dim / 2,) for each axis: theta ** (-2 k / dim)."""
    return [1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)) for dim in dims]


def caption_places(length: int) -> Tensor:
    """Places of a caption of this padded length, (length, 3), on the CPU."""
    return functional.pad(torch.arange(1, 1 + length)[:, None], (0, 2))


def picture_places(frame: int, rows: int, columns: int, length: int) -> Tensor:
    """Places of a picture's tokens, row by row, and of its padding up to `length`: (length, 3), on the CPU."""
    grid = torch.cartesian_prod(torch.tensor([frame]), torch.arange(rows), torch.arange(columns))
    return functional.pad(grid, (0, 0, 0, length - len(grid)))


def rotary(
    places: Tensor, axis_frequencies: Sequence[Tensor], device: torch.device, amplitudes: Sequence[float] = (1, 1, 1)
) -> Rotary:
    """The tables of tokens at `places` (S, axes), on `device`. Turned pairs of an axis grow by its amplitude.

    Angles are float64 products rounded to float32, as in diffusers, and so small that a CPU makes them: one row for
    each place on an axis, which the tokens then look up.
    """
    where = places.to(device)
    circles: list[Tensor] = []
    for axis, (per_place, amplitude) in enumerate(zip(axis_frequencies, amplitudes, strict=True)):
        count = int(places[:, axis].max()) + 1
        angles = torch.outer(torch.arange(count, dtype=torch.float64), per_place).float()
        # torch.cos differs from this one in last bits, and diffusers takes this one.
        circle = torch.view_as_real(torch.polar(torch.full_like(angles, amplitude), angles)).to(device)
        circles.append(circle[where[:, axis]])  # (S, dim / 2, 2)
    first = torch.cat(circles, -2)
    return Rotary(first, torch.stack((-first[..., 1], first[..., 0]), -1))


def turn(x: Tensor, table: Rotary) -> Tensor:
    """Queries or keys (B, S, heads, head_dim), each pair of channels turned; computed in float32. The table has a batch
    axis or is one for all.
    """
    pairs = x.view(*x.shape[:-1], -1, 2)
    first = pairs[..., :1] * table.first.unsqueeze(-3)  # (B, S, heads, head_dim / 2, 2)
    second = pairs[..., 1:] * table.second.unsqueeze(-3)
    return torch.add(first, second, out=torch.empty_like(pairs)).view(x.shape)
