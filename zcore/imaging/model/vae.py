"""Latents to pixels and back.

Takes the VAE that the loader gave; encodes one picture and decodes latents of one picture, in one piece or in tiles.
Does not know how latents come to be or what becomes of pixels.
"""

from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zcore.imaging.geometry import LATENT_PX
from zcore.imaging.model.tiling import Span, Tiling, gathered, spans

UNTOLD_MEMORY_BYTES = 8 * 1024**3
"""What the VAE may take where a device does not tell its free memory in earnest: on a CPU and on MPS."""

WIDEST_TENSORS = 4
"""How many tensors of full size and `block_out_channels[1]` channels there are at once at the peak: 3.9 measured for
the published VAE's decoder on a CPU, 2.5 for its encoder. Three follow from a block's arithmetic, the rest is the
convolution's own.
"""


class _AutoencoderKL(Protocol):
    """The part of diffusers' `AutoencoderKL` (Apache-2.0) that is used."""

    config: Any

    def encode(self, x: Tensor, return_dict: Literal[False]) -> tuple[Any]: ...
    def decode(self, z: Tensor, return_dict: Literal[False]) -> tuple[Tensor]: ...


class PictureCoder:
    """One picture's pixels to latents, and latents to pixels.

    What would not fit the device's memory goes through in tiles, asked for or not. Memory is then that of one tile,
    and the picture itself on the CPU. Tiles see nothing of each other, so the picture is not quite that of one piece:
    they should be large.
    """

    def __init__(self, vae: nn.Module, device: torch.device, dtype: torch.dtype, tiling: Tiling | None = None) -> None:
        self._vae = cast(_AutoencoderKL, vae)
        self._device = device
        self._dtype = dtype
        self._tiling = tiling or Tiling()
        self._scaling = float(self._vae.config.scaling_factor)
        self._shift = float(self._vae.config.shift_factor or 0.0)

    def encode(self, image: Image.Image, generator: torch.Generator, tiled: bool = False) -> Tensor:
        """Latents (16, h / 8, w / 8), float32 on the VAE's device, of an RGB picture whose sides are multiples of 16.

        They are drawn from what the VAE takes to be possible, by the generator: the same state, the same latents.
        """
        levels = torch.tensor(np.asarray(image.convert("RGB"))).permute(2, 0, 1)  # (3, H, W) on the CPU
        in_tiles = tiled or not self._fits(image.width * image.height)
        possible = self._encoded_in_tiles(levels) if in_tiles else self._encoded(levels)
        mean, log_variance = possible.to(self._device, self._dtype).chunk(2)
        noise = torch.randn(mean.shape, generator=generator, device=generator.device, dtype=mean.dtype)
        latents = mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise.to(self._device)
        return ((latents - self._shift) * self._scaling).float()

    def decode(self, latents: Tensor, tiled: bool = False) -> Image.Image:
        """(16, h, w) of any float type to 8h x 8w pixels."""
        in_tiles = tiled or not self._fits(latents.shape[1] * latents.shape[2] * LATENT_PX**2)
        pixels = self._decoded_in_tiles(latents) if in_tiles else self._decoded(latents).float()
        levels = pixels.div_(2).add_(0.5).clamp_(0, 1).mul_(255).round_().to(torch.uint8)
        return Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())

    def _encoded(self, levels: Tensor) -> Tensor:
        """Means and logarithms of variances, (32, H / 8, W / 8), of a picture or tile (3, H, W) of 0..255."""
        pixels = (levels.to(self._device).float() / 255.0 * 2.0 - 1.0).to(self._dtype)
        (posterior,) = self._vae.encode(pixels.unsqueeze(0), return_dict=False)
        return cast(Tensor, posterior.parameters)[0]

    def _decoded(self, latents: Tensor) -> Tensor:
        """(3, 8h, 8w) in about -1 to 1."""
        scaled = latents.to(self._device, self._dtype) / self._scaling + self._shift
        (pixels,) = self._vae.decode(scaled.unsqueeze(0), return_dict=False)
        return pixels[0]

    def _encoded_in_tiles(self, levels: Tensor) -> Tensor:
        def tile_of(row: Span, column: Span) -> Tensor:
            rows = slice(row.start * LATENT_PX, row.stop * LATENT_PX)
            columns = slice(column.start * LATENT_PX, column.stop * LATENT_PX)
            return self._encoded(levels[:, rows, columns])

        rows, columns = (self._spans(side // LATENT_PX, LATENT_PX) for side in levels.shape[1:])
        return gathered(rows, columns, 2 * self._vae.config.latent_channels, tile_of)

    def _decoded_in_tiles(self, latents: Tensor) -> Tensor:
        def tile_of(row: Span, column: Span) -> Tensor:
            rows = slice(row.start // LATENT_PX, row.stop // LATENT_PX)
            columns = slice(column.start // LATENT_PX, column.stop // LATENT_PX)
            return self._decoded(latents[:, rows, columns])

        rows, columns = (self._spans(side * LATENT_PX, 1) for side in latents.shape[1:])
        return gathered(rows, columns, self._vae.config.out_channels, tile_of)

    def _spans(self, length: int, unit_px: int) -> list[Span]:
        return spans(length, self._tiling.size_px // unit_px, self._tiling.overlap_px // unit_px)

    def _fits(self, pixels: int) -> bool:
        """Whether a picture of so many pixels goes through in one piece."""
        widest = pixels * int(self._vae.config.block_out_channels[1]) * self._dtype.itemsize
        return WIDEST_TENSORS * widest <= _free_bytes(self._device)


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return UNTOLD_MEMORY_BYTES
    free, _total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
