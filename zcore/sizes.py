"""Picture sizes by name: aspect ratios, the presets of the published model's demo, and `1024x768` as text.

Takes what a person says about a size; gives width and height in pixels, multiples of 16. Plain arithmetic; knows no
request and no operator's limit.

The table is that of the official demo (Tongyi-MAI/Z-Image-Turbo): three resolution classes that the model was trained
around. Other classes follow by area: both sides keep the ratio as well as multiples of 16 allow, and their product is
about resolution x resolution.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

SIDE_MULTIPLE_PX = 16
SMALLEST_SIDE_PX = 64
LARGEST_SIDE_PX = 8192


@dataclass(frozen=True, slots=True)
class Size:
    """Pixels."""

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
"""Landscape sizes by resolution class and ratio; a portrait is its landscape turned."""

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
"""Names that other services use, and the ratio that each means."""

_PIXELS = re.compile(r"(\d{2,4})[xX×](\d{2,4})")
_RATIO = re.compile(r"(\d{1,3}):(\d{1,3})")
_STEEPEST_RATIO = 8.0


def named_size(name: str, resolution: int) -> Size:
    """The size that a preset, a ratio (`16:9`) or a pair of sides (`1024x768`) means.

    `resolution` is the side of the square of the same area, in pixels; a pair of sides does not need it. Raises
    ValueError with a sentence for a person; bounds of sides are left to whoever asks.
    """
    if found := _PIXELS.fullmatch(name):
        return Size(int(found[1]), int(found[2]))
    ratio = PRESETS.get(name, name)
    found = _RATIO.fullmatch(ratio)
    if found is None:
        raise ValueError(f"`{name}` is neither WIDTHxHEIGHT, nor a ratio as 16:9, nor one of {', '.join(PRESETS)}")
    across, down = int(found[1]), int(found[2])
    if not across or not down or not 1 / _STEEPEST_RATIO <= across / down <= _STEEPEST_RATIO:
        raise ValueError(f"the ratio {name} is outside 1:8 to 8:1")
    return _trained(across, down, resolution) or _by_area(across / down, resolution)


def _trained(across: int, down: int, resolution: int) -> Size | None:
    table = TRAINED.get(resolution, {})
    if found := table.get(f"{across}:{down}"):
        return found
    turned = table.get(f"{down}:{across}")
    return Size(turned.height, turned.width) if turned else None


def _by_area(ratio: float, resolution: int) -> Size:
    return Size(_side(resolution * sqrt(ratio)), _side(resolution / sqrt(ratio)))


def _side(wanted_px: float) -> int:
    nearest = round(wanted_px / SIDE_MULTIPLE_PX) * SIDE_MULTIPLE_PX
    return min(max(nearest, SMALLEST_SIDE_PX), LARGEST_SIDE_PX)
