"""Which sizes can be asked for, by name and by bounds."""

import math

from litestar import get

from server.dependencies import NamedSettings, Owner
from server.problems import refusal
from server.schemas import NamedSize, SidesBounds, SizeList, SizePair
from zcore.sizes import (
    LARGEST_SIDE_PX,
    PRESETS,
    RATIOS,
    SIDE_MULTIPLE_PX,
    SMALLEST_SIDE_PX,
    TRAINED,
    named_size,
)


@get(
    "/api/sizes",
    tags=["sizes"],
    summary="Sizes by name, and their bounds",
    responses={401: refusal("No API key, or a wrong one")},
    sync_to_thread=False,
)
def list_sizes(owner: Owner, settings: NamedSettings) -> SizeList:
    """Presets for `size`, ratios for `aspect_ratio` at the operator's usual resolution, and what is refused."""
    usual = settings.generation_defaults
    resolution = round(math.sqrt(usual.width * usual.height))
    return SizeList(
        presets=[_named(name, ratio, resolution) for name, ratio in PRESETS.items()],
        ratios=[_named(ratio, ratio, resolution) for ratio in RATIOS],
        resolutions=sorted({resolution, *TRAINED}),
        default=SizePair(usual.width, usual.height),
        limits=SidesBounds(SMALLEST_SIDE_PX, LARGEST_SIDE_PX, SIDE_MULTIPLE_PX, settings.limits.max_pixels),
    )


def _named(name: str, ratio: str, resolution: int) -> NamedSize:
    size = named_size(ratio, resolution)
    return NamedSize(name, ratio, size.width, size.height)
