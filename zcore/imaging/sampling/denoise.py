"""The walk from noise to a picture's latents.

Takes start latents, noise levels and a function that says where latents want to go; gives the latents at the end.
Keeps no state between calls. Does not know the model, the prompt or the schedule's formula.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from zcore.imaging.geometry import LatentSize

Velocity = Callable[[Tensor, int], Tensor]
"""(latents, step) -> d latents / d sigma at the step's noise level, of the latents' shape, float32."""


def start_latents(generator: torch.Generator, channels: int, size: LatentSize) -> Tensor:
    """Noise, float32 (channels, h, w), drawn on the generator's device; as diffusers draws for one picture."""
    shape = (1, channels, size.height, size.width)
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)[0]


def denoise(velocity: Velocity, latents: Tensor, sigmas: list[float], before_step: Callable[[int], None]) -> Tensor:
    """Euler's method for d x / d sigma = v(x, step), in float32, along `sigmas` from first to last.

    `before_step` is told the number of steps done, before each; what it raises ends the walk.
    """
    for done, (sigma, next_sigma) in enumerate(pairwise(sigmas)):
        before_step(done)
        latents = latents + (next_sigma - sigma) * velocity(latents, done)
    return latents
