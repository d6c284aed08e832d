"""The VAE: images to latents and back, in one piece or in tiles."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zcore.checkpoint.geometry import LATENT_PX
from zcore.imaging.architecture.vae_network import VaeNetwork
from zcore.imaging.finite_values import require_finite
from zcore.imaging.network.tiling import Span, Tiling, gathered, spans

UNKNOWN_MEMORY_BYTES = 8 * 1024**3
"""What the VAE may use on devices that do not report their free memory reliably: a CPU and MPS."""

WIDEST_TENSORS = 4
"""The number of full-size tensors with `block_out_channels[1]` channels at the peak: 3.9 measured for the published
VAE's decoder on a CPU, 2.5 for its encoder. Three follow from a block's arithmetic, the rest is the convolution's own.
"""


class VaeCodec:
    """Converts one image to latents, and latents to an image; in tiles if a tiling is given.

    In tiles, the device's memory holds one tile, and the image is on the CPU. Tiles do not see each other, so the
    result differs slightly from that of one piece; tiles should be large.
    """

    def __init__(self, vae: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self._vae = cast(VaeNetwork, vae)
        self._module = vae
        self._device = device
        self.dtype = dtype
        self._scaling = float(self._vae.config.scaling_factor)
        self._shift = float(self._vae.config.shift_factor or 0.0)

    @contextmanager
    def in_float32(self) -> Generator["VaeCodec"]:
        """Provide this VAE in float32; after the block, its weights are what they were, bit for bit."""
        try:
            yield VaeCodec(self._module.to(torch.float32), self._device, torch.float32)
        finally:
            self._module.to(self.dtype)

    def fits(self, width_px: int, height_px: int) -> bool:
        """Return whether an image of this size, in one piece, fits into the memory that is free now."""
        widest = width_px * height_px * int(self._vae.config.block_out_channels[1]) * self.dtype.itemsize
        return WIDEST_TENSORS * widest <= _free_bytes(self._device)

    def encode_latents(self, image: Image.Image, tiling: Tiling | None = None) -> Tensor:
        """Return the distribution of an RGB image's latents: means and logarithms of variances, (32, h / 8, w / 8).

        The image's sides are multiples of 16. `sample_latents` takes the result. Raises `NonFiniteValues`.
        """
        levels = torch.tensor(np.asarray(image.convert("RGB"))).permute(2, 0, 1)  # (3, H, W) on the CPU
        encoded = self._encoded(levels) if tiling is None else self._encoded_in_tiles(levels, tiling)
        require_finite(encoded, "the latents of the input image")
        return encoded.to(self._device, self.dtype)

    def sample_latents(self, distribution: Tensor, generator: torch.Generator) -> Tensor:
        """Sample latents (16, h / 8, w / 8), float32 on the VAE's device, from the result of `encode_latents`.

        The same state of the generator gives the same latents. Raises `NonFiniteValues`.
        """
        mean, log_variance = distribution.chunk(2)
        noise = torch.randn(mean.shape, generator=generator, device=generator.device, dtype=mean.dtype)
        latents = mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise.to(self._device)
        sampled = ((latents - self._shift) * self._scaling).float()
        require_finite(sampled, "the latents of the input image")
        return sampled

    def decode_latents(self, latents: Tensor, tiling: Tiling | None = None) -> Image.Image:
        """Return the image of latents (16, h, w) of any float dtype: 8h x 8w pixels. Raises `NonFiniteValues`."""
        pixels = self._decoded(latents).float() if tiling is None else self._decoded_in_tiles(latents, tiling)
        require_finite(pixels, "the decoded pixels")
        levels = pixels.div_(2).add_(0.5).clamp_(0, 1).mul_(255).round_().to(torch.uint8)
        return Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())

    def _encoded(self, levels: Tensor) -> Tensor:
        """Map an image or tile (3, H, W) of 0..255 to means and logarithms of variances, (32, H / 8, W / 8)."""
        pixels = (levels.to(self._device).float() / 255.0 * 2.0 - 1.0).to(self.dtype)
        return self._vae.encode(pixels.unsqueeze(0))[0]

    def _decoded(self, latents: Tensor) -> Tensor:
        """Map latents (16, h, w) to pixels (3, 8h, 8w) of about -1 to 1."""
        scaled = latents.to(self._device, self.dtype) / self._scaling + self._shift
        return self._vae.decode(scaled.unsqueeze(0))[0]

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
        return UNKNOWN_MEMORY_BYTES
    free, _total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
