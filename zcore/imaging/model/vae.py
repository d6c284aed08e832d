"""Latents to a picture.

Takes the VAE that the loader gave and latents of one picture; gives an RGB image of eight bits. Does not know how the
latents came to be.
"""

from typing import Any, Literal, Protocol, cast

import torch
from PIL import Image
from torch import Tensor, nn


class _AutoencoderKL(Protocol):
    """The part of diffusers' `AutoencoderKL` (Apache-2.0) that is used."""

    config: Any

    def decode(self, z: Tensor, return_dict: Literal[False]) -> tuple[Tensor]: ...


class PictureDecoder:
    """Latents of one picture to its pixels."""

    def __init__(self, vae: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self._vae = cast(_AutoencoderKL, vae)
        self._device = device
        self._dtype = dtype
        self._scaling = float(self._vae.config.scaling_factor)
        self._shift = float(self._vae.config.shift_factor or 0.0)

    def decode(self, latents: Tensor) -> Image.Image:
        """(16, h, w) of any float type to 8h x 8w pixels."""
        scaled = latents.to(self._device, self._dtype) / self._scaling + self._shift
        (pixels,) = self._vae.decode(scaled.unsqueeze(0), return_dict=False)  # (1, 3, H, W) in [-1, 1]
        levels = (pixels[0].float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        return Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())
