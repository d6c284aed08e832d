"""Latents to pixels and back.

Takes the VAE that the loader gave; encodes one picture and decodes latents of one picture, in one piece or in tiles, as
it is told. Does not know how latents come to be or what becomes of pixels.
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
    """One picture's pixels to latents, and latents to pixels; in tiles where a tiling is given.

    Memory is then that of one tile, and the picture itself on the CPU. Tiles see nothing of each other, so the picture
    is not quite that of one piece: they should be large.
    """

    def __init__(self, vae: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self._vae = cast(_AutoencoderKL, vae)
        self._device = device
        self._dtype = dtype
        self._scaling = float(self._vae.config.scaling_factor)
        self._shift = float(self._vae.config.shift_factor or 0.0)

    def fits(self, width_px: int, height_px: int) -> bool:
        """Whether such a picture would go through in one piece, by the memory that is free at this moment."""
        widest = width_px * height_px * int(self._vae.config.block_out_channels[1]) * self._dtype.itemsize
        return WIDEST_TENSORS * widest <= _free_bytes(self._device)

    def encode(self, image: Image.Image, tiling: Tiling | None = None) -> Tensor:
        """What latents an RGB picture may have, whose sides are multiples of 16: means and logarithms of variances,
        (32, h / 8, w / 8), for `draw`.
        """
        levels = torch.tensor(np.asarray(image.convert("RGB"))).permute(2, 0, 1)  # (3, H, W) on the CPU
        return self._encoded(levels) if tiling is None else self._encoded_in_tiles(levels, tiling)

    def draw(self, possible: Tensor, generator: torch.Generator) -> Tensor:
        """Latents (16, h / 8, w / 8), float32 on the VAE's device, out of what `encode` gave: the same state of the
        generator, the same latents.
        """
        mean, log_variance = possible.to(self._device, self._dtype).chunk(2)
        noise = torch.randn(mean.shape, generator=generator, device=generator.device, dtype=mean.dtype)
        latents = mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise.to(self._device)
        return ((latents - self._shift) * self._scaling).float()

    def decode(self, latents: Tensor, tiling: Tiling | None = None) -> Image.Image:
        """(16, h, w) of any float type to 8h x 8w pixels."""
        pixels = self._decoded(latents).float() if tiling is None else self._decoded_in_tiles(latents, tiling)
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

    def _encoded_in_tiles(self, levels: Tensor, tiling: Tiling) -> Tensor:
        def tile_of(row: Span, column: Span) -> Tensor:
            rows = slice(row.start * LATENT_PX, row.stop * LATENT_PX)
            columns = slice(column.start * LATENT_PX, column.stop * LATENT_PX)
            return self._encoded(levels[:, rows, columns])

        rows, columns = (_spans(side // LATENT_PX, LATENT_PX, tiling) for side in levels.shape[1:])
        return gathered(rows, columns, 2 * self._vae.config.latent_channels, tile_of)

    def _decoded_in_tiles(self, latents: Tensor, tiling: Tiling) -> Tensor:
        def tile_of(row: Span, column: Span) -> Tensor:
            rows = slice(row.start // LATENT_PX, row.stop // LATENT_PX)
            columns = slice(column.start // LATENT_PX, column.stop // LATENT_PX)
            return self._decoded(latents[:, rows, columns])

        rows, columns = (_spans(side * LATENT_PX, 1, tiling) for side in latents.shape[1:])
        return gathered(rows, columns, self._vae.config.out_channels, tile_of)


def _spans(length: int, unit_px: int, tiling: Tiling) -> list[Span]:
    return spans(length, tiling.size_px // unit_px, tiling.overlap_px // unit_px)


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return UNTOLD_MEMORY_BYTES
    free, _total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
