"""The size that a checkpoint was trained at, and what follows for larger images. Needs no torch."""

from pathlib import Path
from typing import Annotated, cast

from msgspec import Meta

from zcore.checkpoint.files import locate_local, read_json
from zcore.errors import CheckpointError
from zcore.request import GenerationRequest, field_errors
from zcore.sizes import SIDE_MULTIPLE_PX, TRAINED

PUBLISHED_SIDE_PX = min(TRAINED)
"""The side of the square that the published checkpoint was trained at: 1024."""


def trained_side(folder: Path) -> int:
    """Return the side in pixels, `sample_size` of `vae/config.json`: 1024 in the published checkpoint.

    Raises `CheckpointError` naming the file if it cannot be read or has no such number.
    """
    path = folder / "vae" / "config.json"
    side = read_json(path).get("sample_size")
    for error in field_errors(side, Annotated[int, Meta(ge=1, le=65_536)], "sample_size"):
        raise CheckpointError(f"{path}: sample_size {error.detail}")
    return cast(int, side)


def trained_side_here(model_location: str) -> int:
    """Return `trained_side` of a checkpoint that is on this host, else that of the published one. Downloads nothing."""
    folder = locate_local(model_location)
    is_known = folder is not None and (folder / "vae" / "config.json").is_file()
    return trained_side(folder) if folder is not None and is_known else PUBLISHED_SIDE_PX


def resolutions(side_px: int) -> list[int]:
    """Return the resolutions to offer, in the proportions of the published model's: 1024, 1280 and 1536 for 1024."""
    scaled = (round(side_px * one / PUBLISHED_SIDE_PX / SIDE_MULTIPLE_PX) * SIDE_MULTIPLE_PX for one in TRAINED)
    return sorted({max(one, SIDE_MULTIPLE_PX) for one in scaled})


def size_notice(request: GenerationRequest, side_px: int) -> str | None:
    """Return a warning if the request's area is above that of the largest of `resolutions`; None if it is not.

    DyPE and several passes are made for such sizes, so they silence it.
    """
    largest = resolutions(side_px)[-1]
    if request.width * request.height <= largest**2 or request.passes or request.dype:
        return None
    return (
        f"{request.width}x{request.height} is far above {side_px}x{side_px}, which this checkpoint was trained at; "
        f"expect repeated or noisy content above {largest}x{largest}, or use passes or dype"
    )
