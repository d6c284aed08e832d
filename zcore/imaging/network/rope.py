"""Rotary position embeddings: tokens' positions, and the angles by which their queries and keys are rotated.

Takes positions and frequencies; returns tables of cosines and sines in real numbers. Does not depend on the networks:
different frequencies or amplitudes give different tables, for a whole image or for one step.

A token's position is (frame, row, column), and each axis has a share of a head's channels. Caption token k is at
(1 + k, 0, 0), including its padding; the image's tokens are one frame after the padded caption; the padding of the
image is at the origin. RoPE is Su et al. 2021 (arXiv:2104.09864), on neighbouring pairs of channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Rotary:
    """The rotations of a row of tokens: (cos a, sin a) and (-sin a, cos a) for the angle a of each pair of channels.

    Both are float32 (..., S, head_dim / 2, 2): the rotated first and second unit vectors of each pair.
    """

    first: Tensor
    second: Tensor


def frequencies(theta: float, dims: Sequence[int]) -> list[Tensor]:
    """Return radians per position, float64 (dim / 2,) for each axis: theta ** (-2 k / dim)."""
    return [1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)) for dim in dims]


def caption_positions(length: int) -> Tensor:
    """Return the positions of a caption of this padded length, (length, 3), on the CPU."""
    return functional.pad(torch.arange(1, 1 + length)[:, None], (0, 2))


def image_positions(frame: int, rows: int, columns: int, length: int) -> Tensor:
    """Return the positions of an image's tokens, row by row, and of its padding: (length, 3), on the CPU."""
    grid = torch.cartesian_prod(torch.tensor([frame]), torch.arange(rows), torch.arange(columns))
    return functional.pad(grid, (0, 0, 0, length - len(grid)))


def rotary(
    positions: Tensor, axis_frequencies: Sequence[Tensor], device: torch.device, amplitudes: Sequence[float] = (1, 1, 1)
) -> Rotary:
    """Return the tables of tokens at `positions` (S, axes), on `device`. An axis's amplitude scales its rotated pairs.

    Angles are float64 products rounded to float32, as in diffusers. They are few enough for the CPU: one row for each
    position on an axis, which the tokens then look up.
    """
    indices = positions.to(device)
    circles: list[Tensor] = []
    for axis, (radians, amplitude) in enumerate(zip(axis_frequencies, amplitudes, strict=True)):
        count = int(positions[:, axis].max()) + 1
        angles = torch.outer(torch.arange(count, dtype=torch.float64), radians).float()
        # As in diffusers: torch.cos differs from torch.polar in the last bits.
        circle = torch.view_as_real(torch.polar(torch.full_like(angles, amplitude), angles)).to(device)
        circles.append(circle[indices[:, axis]])  # (S, dim / 2, 2)
    first = torch.cat(circles, -2)
    return Rotary(first, torch.stack((-first[..., 1], first[..., 0]), -1))


def apply_rotary(x: Tensor, table: Rotary) -> Tensor:
    """Rotate each pair of channels of queries or keys (B, S, heads, head_dim), computing in float32.

    The table has a batch axis, or is the same for all samples.
    """
    pairs = x.view(*x.shape[:-1], -1, 2)
    first = pairs[..., :1] * table.first.unsqueeze(-3)  # (B, S, heads, head_dim / 2, 2)
    second = pairs[..., 1:] * table.second.unsqueeze(-3)
    return torch.add(first, second, out=torch.empty_like(pairs)).view(x.shape)
