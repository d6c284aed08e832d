"""Flow-matching arithmetic: initial noise, noised latents, one Euler step.

Plain functions of tensors, without state and without the model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from zcore.checkpoint.geometry import LatentSize


@dataclass(frozen=True, slots=True)
class PreservedRegion:
    """The part of images that inpainting does not generate.

    `latents` are those of the input images and `noise` is what the images started from, both (B, 16, h, w); `mask`
    (1, h, w) is 1 where images are generated.
    """

    latents: Tensor
    noise: Tensor
    mask: Tensor

    def restore(self, generated: Tensor, sigma: float) -> Tensor:
        """Return `generated` (B, 16, h, w) at noise level `sigma` with the preserved region put back."""
        original = add_noise(self.latents, self.noise, sigma) if sigma else self.latents
        return (1 - self.mask) * original + self.mask * generated


def draw_initial_noise(generator: torch.Generator, channels: int, size: LatentSize) -> Tensor:
    """Draw noise, float32 (channels, h, w) on the generator's device, as diffusers draws it for one image."""
    shape = (1, channels, size.height, size.width)
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)[0]


def add_noise(latents: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Return latents at a noise level: (1 - sigma) latents + sigma noise."""
    return (1.0 - sigma) * latents + sigma * noise


def euler_step(latents: Tensor, velocity: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """Return latents after one step of Euler's method for dx / d sigma = v(x, sigma), float32."""
    return latents + (next_sigma - sigma) * velocity
