"""Available image sizes: the named ones, and the bounds of custom ones."""

import math

from litestar import get

from server.dependencies import NamedCaller, NamedDefaults, NamedSettings, NamedTrainedSide
from server.schemas import NamedSize, SidesBounds, SizeList, SizePair
from zcore.checkpoint.trained_size import resolutions
from zcore.sizes import (
    LARGEST_SIDE_PX,
    PRESETS,
    RATIOS,
    SIDE_MULTIPLE_PX,
    SMALLEST_SIDE_PX,
    named_size,
)


@get(
    "/api/sizes",
    tags=["sizes"],
    summary="List image sizes and their bounds",
    sync_to_thread=False,
)
def list_sizes(
    caller: NamedCaller, settings: NamedSettings, defaults: NamedDefaults, trained_px: NamedTrainedSide
) -> SizeList:
    """Lists presets for `size`, ratios for `aspect_ratio` at the default resolution, and the limits of any size.

    `resolutions` are the default and those around which the loaded checkpoint was trained, within the limits.
    """
    resolution = round(math.sqrt(defaults.width * defaults.height))
    return SizeList(
        presets=[_named(name, ratio, resolution) for name, ratio in PRESETS.items()],
        ratios=[_named(ratio, ratio, resolution) for ratio in RATIOS],
        resolutions=sorted(
            {resolution, *(one for one in resolutions(trained_px) if one**2 <= settings.limits.max_pixels)}
        ),
        default=SizePair(defaults.width, defaults.height),
        limits=SidesBounds(SMALLEST_SIDE_PX, LARGEST_SIDE_PX, SIDE_MULTIPLE_PX, settings.limits.max_pixels),
    )


def _named(name: str, ratio: str, resolution: int) -> NamedSize:
    size = named_size(ratio, resolution)
    return NamedSize(name, ratio, size.width, size.height)
