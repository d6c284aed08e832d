"""Image sizes by name: aspect ratios, the presets of the published model's demo, and `1024x768` as text.

Takes the text of a size; returns width and height in pixels. Depends on neither requests nor the operator's limits.

The table is that of the official demo (Tongyi-MAI/Z-Image-Turbo): the three resolution classes around which the model
was trained. Sizes of other classes are derived by area: both sides keep the ratio as closely as multiples of 16 allow,
and their product is about resolution x resolution.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt, sqrt

from zcore.errors import did_you_mean

SIDE_MULTIPLE_PX = 16
SMALLEST_SIDE_PX = 64
LARGEST_SIDE_PX = 8192


@dataclass(frozen=True, slots=True)
class Size:
    """Width and height in pixels."""

    width: int
    height: int


TRAINED: Mapping[int, Mapping[str, Size]] = {
    1024: {
        "1:1": Size(1024, 1024),
        "9:7": Size(1152, 896),
        "4:3": Size(1152, 864),
        "3:2": Size(1248, 832),
        "16:9": Size(1280, 720),
        "21:9": Size(1344, 576),
    },
    1280: {
        "1:1": Size(1280, 1280),
        "9:7": Size(1440, 1120),
        "4:3": Size(1472, 1104),
        "3:2": Size(1536, 1024),
        "16:9": Size(1536, 864),
        "21:9": Size(1680, 720),
    },
    1536: {
        "1:1": Size(1536, 1536),
        "9:7": Size(1728, 1344),
        "4:3": Size(1728, 1296),
        "3:2": Size(1872, 1248),
        "16:9": Size(2048, 1152),
        "21:9": Size(2016, 864),
    },
}
"""Landscape sizes by resolution class and ratio; a portrait swaps the sides of its landscape."""

RATIOS = (*TRAINED[1024], "7:9", "3:4", "2:3", "9:16", "9:21")
PRESETS: Mapping[str, str] = {
    "square": "1:1",
    "landscape_4_3": "4:3",
    "landscape_3_2": "3:2",
    "landscape_16_9": "16:9",
    "landscape_21_9": "21:9",
    "portrait_4_3": "3:4",
    "portrait_3_2": "2:3",
    "portrait_16_9": "9:16",
    "portrait_21_9": "9:21",
}
"""Names that other services use, with the ratio of each."""

_PIXELS = re.compile(r"([0-9]{1,6})[xX×]([0-9]{1,6})")
_RATIO = re.compile(r"([0-9]{1,3}):([0-9]{1,3})")
_STEEPEST_RATIO = 8
_RATIO_BOUNDS = f"must be a ratio from 1:{_STEEPEST_RATIO} to {_STEEPEST_RATIO}:1"


def named_size(name: str, resolution: int) -> Size:
    """Return the size of a preset, a ratio (`16:9`) or a pair of sides (`1024x768`).

    `resolution` is the side in pixels of the square of the same area; a pair of sides ignores it, and is returned
    without a check of its bounds. Raises ValueError with a message for callers.
    """
    if found := _PIXELS.fullmatch(name):
        return Size(int(found[1]), int(found[2]))
    found = _RATIO.fullmatch(PRESETS.get(name, name))
    if found is None:
        presets = ", ".join(PRESETS)
        raise ValueError(
            f"must be WIDTHxHEIGHT, a ratio such as 16:9, auto, or one of {presets}{did_you_mean(name, PRESETS)}"
        )
    across, down = int(found[1]), int(found[2])
    if across > down * _STEEPEST_RATIO or not down:
        raise ValueError(f"{_RATIO_BOUNDS}; the nearest is {_STEEPEST_RATIO}:1")
    if down > across * _STEEPEST_RATIO:
        raise ValueError(f"{_RATIO_BOUNDS}; the nearest is 1:{_STEEPEST_RATIO}")
    return _trained(across, down, resolution) or _by_area(across / down, resolution)


def largest_size(width: int, height: int, max_pixels: int) -> Size:
    """Return the largest valid size of at most `max_pixels` (64 x 64 or more) with about the same ratio."""
    if width < height:
        landscape = largest_size(height, width, max_pixels)
        return Size(landscape.height, landscape.width)
    longer = _rounded_down(isqrt(max_pixels * width // height))
    shorter = max(min(_side(longer * height / width), _rounded_down(max_pixels // longer)), SMALLEST_SIDE_PX)
    return Size(min(longer, _rounded_down(max_pixels // shorter)), shorter)


def _rounded_down(side_px: int) -> int:
    return side_px // SIDE_MULTIPLE_PX * SIDE_MULTIPLE_PX


def _trained(across: int, down: int, resolution: int) -> Size | None:
    table = TRAINED.get(resolution, {})
    if found := table.get(f"{across}:{down}"):
        return found
    landscape = table.get(f"{down}:{across}")
    return Size(landscape.height, landscape.width) if landscape else None


def _by_area(ratio: float, resolution: int) -> Size:
    return Size(_side(resolution * sqrt(ratio)), _side(resolution / sqrt(ratio)))


def _side(wanted_px: float) -> int:
    nearest = round(wanted_px / SIDE_MULTIPLE_PX) * SIDE_MULTIPLE_PX
    return min(max(nearest, SMALLEST_SIDE_PX), LARGEST_SIDE_PX)
