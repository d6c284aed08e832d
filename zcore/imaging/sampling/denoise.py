"""The walk from noise to latents, of one picture or of several at once.

Takes start latents, noise levels and a function that says where latents want to go; gives the latents at the end.
Keeps no state between calls. Does not know the model, the prompt or the schedule's formula.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from zcore.imaging.geometry import LatentSize

Velocity = Callable[[Tensor, int], Tensor]
"""(latents, step) -> d latents / d sigma at the noise level of that step, of the latents' shape, float32."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The part of pictures that is not painted anew: inpainting.

    `picture` are their latents, `noise` what they began with, both (B, 16, h, w); `mask` (1, h, w) is 1 where to paint.
    """

    picture: Tensor
    noise: Tensor
    mask: Tensor


def draw_noise(generator: torch.Generator, channels: int, size: LatentSize) -> Tensor:
    """Noise, float32 (channels, h, w), drawn on the generator's device; as diffusers draws for one picture."""
    shape = (1, channels, size.height, size.width)
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)[0]


def noised(latents: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Latents at a noise level: (1 - sigma) latents + sigma noise."""
    return (1.0 - sigma) * latents + sigma * noise


def denoise(
    velocity: Velocity,
    latents: Tensor,
    sigmas: list[float],
    before_step: Callable[[int], None],
    kept: Kept | None = None,
) -> Tensor:
    """Euler's method for d x / d sigma = v(x, sigma), in float32 (B, 16, h, w), along `sigmas` from first to last.

    `before_step` is told the number of steps done, before each; what it raises ends the walk. What is `kept` is put
    back after each step, at that step's noise level.
    """
    for step, (sigma, next_sigma) in enumerate(pairwise(sigmas)):
        before_step(step)
        latents = latents + (next_sigma - sigma) * velocity(latents, step)
        if kept is not None:
            proper = noised(kept.picture, kept.noise, next_sigma) if next_sigma else kept.picture
            latents = (1 - kept.mask) * proper + kept.mask * latents
    return latents
