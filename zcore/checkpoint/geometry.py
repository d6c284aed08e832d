"""Every rule about sizes: pixels to latents to tokens, and the positions that the transformer supports.

Takes widths, heights, and token counts; returns the sizes that follow. Needs no torch, so that the server can use it.

The VAE halves a side three times (8 px per latent), and the transformer takes latents in patches of 2x2. So 16 px make
one image token, and every side is a multiple of 16. Captions and image tokens are each padded to a multiple of 32.

A token's position is (frame, row, column), looked up in three tables of `axes_lens` rows (1536, 512, 512 in the
published checkpoint). The limits follow from these:

* rows and columns of patches stay below 512, so a side is at most 512 * 16 = 8192 px;
* caption token k has frame 1 + k, and all image tokens have frame 1 + P, where P is the padded caption length.
  1 + P <= 1535 and P being a multiple of 32 give P <= 1504: a prompt of 1505 tokens is padded to 1536 and would need
  row 1537.
"""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from zcore.errors import CheckpointError, InvalidRequest
from zcore.sizes import SIDE_MULTIPLE_PX

LATENT_PX = 8
"""Pixels per side of one latent."""

PATCH_LATENTS = SIDE_MULTIPLE_PX // LATENT_PX
"""Latents per side of one image token."""

SEQUENCE_MULTIPLE = 32
"""Captions and image tokens are padded to a multiple of this; the padding is attended to."""


@dataclass(frozen=True, slots=True)
class LatentSize:
    """Height and width of one image's latents."""

    height: int
    width: int


class _TransformerConfig(msgspec.Struct, frozen=True):
    axes_lens: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class PlacementLimits:
    """The lengths of a checkpoint's position tables: `axes_lens` of its transformer's configuration."""

    frames: int = 1536
    rows: int = 512
    columns: int = 512

    @classmethod
    def of_checkpoint(cls, model_folder: Path) -> "PlacementLimits":
        """Read `transformer/config.json`. Raises `CheckpointError` naming the file."""
        path = model_folder / "transformer" / "config.json"
        try:
            return cls(*msgspec.json.decode(path.read_bytes(), type=_TransformerConfig).axes_lens)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        except msgspec.DecodeError as error:
            raise CheckpointError(f"{path}: {error}") from error

    @property
    def caption_tokens(self) -> int:
        """The longest prompt in tokens, including those of the chat format: 1504 for 1536 rows."""
        return (self.frames - 2) // SEQUENCE_MULTIPLE * SEQUENCE_MULTIPLE

    @property
    def height_px(self) -> int:
        """The height of the tallest image: 8192 px for 512 rows."""
        return self.rows * SIDE_MULTIPLE_PX

    @property
    def width_px(self) -> int:
        """The width of the widest image: 8192 px for 512 columns."""
        return self.columns * SIDE_MULTIPLE_PX


def latent_size(width_px: int, height_px: int) -> LatentSize:
    """Return the size of an image's latents. Both sides must be multiples of 16, as in any `GenerationRequest`."""
    assert width_px % SIDE_MULTIPLE_PX == height_px % SIDE_MULTIPLE_PX == 0, f"{width_px}x{height_px}"
    return LatentSize(height=height_px // LATENT_PX, width=width_px // LATENT_PX)


def image_tokens(width_px: int, height_px: int) -> int:
    """Return an image's number of tokens without padding: 4096 for 1024x1024."""
    size = latent_size(width_px, height_px)
    return (size.height // PATCH_LATENTS) * (size.width // PATCH_LATENTS)


def padded(tokens: int) -> int:
    """Return a sequence's length with its padding: the next multiple of 32."""
    return -(-tokens // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE


def check_sides(width_px: int, height_px: int, limits: PlacementLimits) -> None:
    """Raise `InvalidRequest` for a side that exceeds the position tables, which on a GPU would crash the process."""
    for field, side, limit in (("width", width_px, limits.width_px), ("height", height_px, limits.height_px)):
        if side > limit:
            raise InvalidRequest.field(field, f"is {side} px; this checkpoint supports at most {limit} px")
