"""Latents to pixels and back.

Takes the VAE that the loader gave; encodes one picture and decodes latents of one picture. Does not know how latents
come to be or what becomes of pixels.
"""

from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


class _AutoencoderKL(Protocol):
    """The part of diffusers' `AutoencoderKL` (Apache-2.0) that is used."""

    config: Any

    def encode(self, x: Tensor, return_dict: Literal[False]) -> tuple[Any]: ...
    def decode(self, z: Tensor, return_dict: Literal[False]) -> tuple[Tensor]: ...


class PictureCoder:
    """One picture's pixels to latents, and latents to pixels."""

    def __init__(self, vae: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self._vae = cast(_AutoencoderKL, vae)
        self._device = device
        self._dtype = dtype
        self._scaling = float(self._vae.config.scaling_factor)
        self._shift = float(self._vae.config.shift_factor or 0.0)

    def encode(self, image: Image.Image, generator: torch.Generator) -> Tensor:
        """Latents (16, h / 8, w / 8), float32 on the VAE's device, of an RGB picture whose sides are multiples of 16.

        They are drawn from what the VAE takes to be possible, by the generator: the same state, the same latents.
        """
        levels = torch.tensor(np.asarray(image.convert("RGB")), device=self._device)  # (h, w, 3)
        pixels = (levels.permute(2, 0, 1).float() / 255.0 * 2.0 - 1.0).to(self._dtype)
        (posterior,) = self._vae.encode(pixels.unsqueeze(0), return_dict=False)
        latents: Tensor = posterior.sample(generator=generator)  # (1, 16, h / 8, w / 8)
        return ((latents[0] - self._shift) * self._scaling).float()

    def decode(self, latents: Tensor) -> Image.Image:
        """(16, h, w) of any float type to 8h x 8w pixels."""
        scaled = latents.to(self._device, self._dtype) / self._scaling + self._shift
        (pixels,) = self._vae.decode(scaled.unsqueeze(0), return_dict=False)  # (1, 3, H, W) in [-1, 1]
        levels = (pixels[0].float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        return Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())
