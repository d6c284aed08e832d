"""Stage `render`: draw compositions as pixels.

`render` draws what a perfect model would generate: flat shapes with smooth edges on a plain background, or a small
landscape. The same composition, size and generator state give the same pixels. The styles `outline` and `night` are
those that the two LoRAs learn.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from zcore.demo.captions import caption
from zcore.demo.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    COUNT_NAMES,
    GROUP_RADIUS,
    GROUPS,
    PAIRS,
    POSITIONS,
    SIZES,
    Colour,
    Composition,
    Kind,
    random_composition,
)

Pixels = NDArray[np.uint8]
Point = tuple[float, float]
Style = Literal["plain", "outline", "night"]

_OVERSAMPLING: Final = 3
_MARGIN: Final = 0.03
_INK: Final[Colour] = (30, 30, 35)
_PAPER: Final[Colour] = (250, 250, 250)
_NIGHT_GROUND: Final[Colour] = (28, 36, 84)
_NIGHT_SKY: Final[tuple[Colour, Colour]] = ((12, 16, 52), (45, 58, 118))
_MOONLIGHT: Final[Colour] = (242, 238, 205)


def render(composition: Composition, width: int, height: int, rng: random.Random, style: Style = "plain") -> Pixels:
    """Return the pixels, (height, width, 3) of 0..255. Positions and sizes vary slightly by `rng`."""
    canvas = _Canvas(width, height, style)
    if composition.kind == "scene":
        _SCENES[composition.layout](canvas, rng)
    else:
        canvas.fill(BACKGROUNDS[composition.background])
        radius = SIZES[composition.size] if composition.kind == "object" else GROUP_RADIUS
        for shape, colour, middle in _placed(composition):
            size = radius * rng.uniform(0.95, 1.05)
            at = canvas.inside(_moved(middle, rng, 0.018), size)
            canvas.polygon([canvas.near(at, point, size) for point in outline_of(shape)], COLOURS[colour])
    return canvas.pixels()


def outline_of(shape: str) -> list[Point]:
    """Return the corners of a shape of radius 1 around (0, 0), y down. All shapes look about equally large."""
    return _OUTLINES[shape]


def write_samples(folder: Path, count: int = 64, seed: int = 0) -> None:
    """Write sample images with their captions as file names."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    kinds: tuple[Kind, ...] = ("object", "object", "count", "pair", "scene")
    for index in range(count):
        composition = random_composition(rng, kinds[index % len(kinds)])
        width, height = rng.choice(((128, 128), (96, 160), (160, 96), (256, 256)))
        name = "".join(c if c.isalnum() else "_" for c in caption(composition, rng))[:100]
        Image.fromarray(render(composition, width, height, rng)).save(folder / f"{index:03d}_{name}.png")


@dataclass
class _Canvas:
    """A drawing surface with coordinates relative to width and height, oversampled for smooth edges."""

    width: int
    height: int
    style: Style = "plain"

    def __post_init__(self) -> None:
        self._image = Image.new("RGB", (self.width * _OVERSAMPLING, self.height * _OVERSAMPLING))
        self._draw = ImageDraw.Draw(self._image)
        self._unit = min(self.width, self.height)

    def fill(self, colour: Colour) -> None:
        ground = {"plain": colour, "outline": _PAPER, "night": _NIGHT_GROUND}[self.style]
        self._image.paste(ground, (0, 0, *self._image.size))

    def gradient(self, top: Colour, bottom: Colour, start: float = 0.0, end: float = 1.0) -> None:
        """Fill the rows from `start` to `end` with a gradient."""
        if self.style == "outline":
            self._draw.rectangle(
                (0, start * self._image.height, self._image.width, end * self._image.height), fill=_PAPER
            )
            if start > 0:
                self._line([(0.0, start), (1.0, start)])
            return
        first, last = round(start * self._image.height), round(end * self._image.height)
        above, below = _NIGHT_SKY if self.style == "night" else (top, bottom)
        for row in range(first, last):
            part = (row - first) / max(1, last - first - 1)
            shade = tuple(round(a + (b - a) * part) for a, b in zip(above, below, strict=True))
            self._draw.line((0, row, self._image.width, row), fill=shade)

    def polygon(self, points: list[Point], colour: Colour) -> None:
        scaled = [(x * self._image.width, y * self._image.height) for x, y in points]
        if self.style == "outline":
            self._draw.polygon(scaled, fill=_PAPER)
            self._line([*points, points[0], points[1]])
        else:
            self._draw.polygon(
                scaled, fill=_MOONLIGHT if self.style == "night" and colour == COLOURS["black"] else colour
            )

    def disc(self, middle: Point, radius: float, colour: Colour) -> None:
        self.polygon([self.near(middle, point, radius) for point in _OUTLINES["circle"]], colour)

    def near(self, middle: Point, offset: Point, radius: float) -> Point:
        """Return the point at `offset` radii from `middle`. The radius is a fraction of the shorter side."""
        unit = radius * self._unit
        return middle[0] + offset[0] * unit / self.width, middle[1] + offset[1] * unit / self.height

    def inside(self, middle: Point, radius: float) -> Point:
        """Return `middle`, moved as far as needed to keep a disc around it on the canvas."""
        x, y = ((radius + _MARGIN) * self._unit / side for side in (self.width, self.height))
        return min(max(middle[0], x), 1 - x), min(max(middle[1], y), 1 - y)

    def pixels(self) -> Pixels:
        return np.asarray(self._image.resize((self.width, self.height), Image.Resampling.BOX)).copy()

    def _line(self, points: list[Point]) -> None:
        scaled = [(x * self._image.width, y * self._image.height) for x, y in points]
        self._draw.line(scaled, fill=_INK, width=round(0.03 * self._unit * _OVERSAMPLING), joint="curve")


def _placed(composition: Composition) -> list[tuple[str, str, Point]]:
    if composition.kind == "object":
        slots: tuple[Point, ...] = (POSITIONS[composition.layout],)
    elif composition.kind == "pair":
        slots = PAIRS[composition.layout]
    else:
        slots = GROUPS[next(number for number, name in COUNT_NAMES.items() if name == composition.layout)]
    things = composition.things if composition.kind == "pair" else composition.things * len(slots)
    return [(thing.shape, thing.colour, slot) for thing, slot in zip(things, slots, strict=True)]


def _moved(point: Point, rng: random.Random, by: float) -> Point:
    return point[0] + rng.uniform(-by, by), point[1] + rng.uniform(-by, by)


def _hills(height: float, swing: float, rng: random.Random) -> list[Point]:
    phase = rng.uniform(0, 1)
    top = [(x / 24, height - swing * math.sin(2 * math.pi * (1.1 * x / 24 + phase))) for x in range(25)]
    return [*top, (1.0, 1.0), (0.0, 1.0)]


def _sunset(canvas: _Canvas, rng: random.Random) -> None:
    canvas.gradient((105, 60, 130), (245, 120, 70), 0.0, 0.45)
    canvas.gradient((245, 120, 70), (255, 200, 100), 0.45, 1.0)
    canvas.disc(_moved((0.5, 0.55), rng, 0.04), 0.17, (255, 240, 160))
    canvas.polygon(_hills(0.72, 0.05, rng), (70, 40, 65))


def _night(canvas: _Canvas, rng: random.Random) -> None:
    canvas.gradient((12, 16, 52), (45, 58, 118))
    for point in ((0.12, 0.14), (0.3, 0.3), (0.14, 0.5), (0.42, 0.1), (0.5, 0.42), (0.7, 0.56), (0.9, 0.52)):
        canvas.disc(_moved(point, rng, 0.01), 0.024, (245, 245, 225))
    canvas.disc(_moved((0.74, 0.24), rng, 0.03), 0.15, (242, 238, 205))
    canvas.polygon(_hills(0.8, 0.04, rng), (14, 22, 32))


def _sea(canvas: _Canvas, rng: random.Random) -> None:
    canvas.gradient((130, 195, 245), (220, 238, 250), 0.0, 0.5)
    canvas.disc(_moved((0.25, 0.22), rng, 0.03), 0.12, (255, 225, 90))
    canvas.gradient((60, 150, 210), (15, 75, 150), 0.5, 1.0)
    for row, start in ((0.6, 0.1), (0.72, 0.5), (0.86, 0.2)):
        left = start + rng.uniform(-0.05, 0.05)
        canvas.polygon(
            [(left, row), (left + 0.35, row), (left + 0.35, row + 0.025), (left, row + 0.025)], (170, 215, 240)
        )


def _meadow(canvas: _Canvas, rng: random.Random) -> None:
    canvas.gradient((120, 190, 245), (205, 232, 250), 0.0, 0.65)
    x, y = _moved((0.68, 0.24), rng, 0.04)
    for dx, dy, radius in ((-0.11, 0.02, 0.075), (0.0, -0.02, 0.1), (0.11, 0.02, 0.075)):
        canvas.disc((x + dx, y + dy), radius, (250, 252, 255))
    canvas.polygon(_hills(0.58, 0.05, rng), (125, 190, 80))
    canvas.polygon(_hills(0.75, 0.05, rng), (70, 150, 55))


def _mountains(canvas: _Canvas, rng: random.Random) -> None:
    canvas.gradient((165, 200, 235), (228, 238, 246), 0.0, 0.85)
    for middle, top, half, shade in ((0.3, 0.26, 0.38, 118), (0.7, 0.16, 0.42, 96)):
        peak = _moved((middle, top), rng, 0.025)
        canvas.polygon([peak, (peak[0] + half, 0.85), (peak[0] - half, 0.85)], (shade, shade + 4, shade + 18))
        cap = (0.85 - peak[1]) * 0.3
        slope = half * 0.3
        canvas.polygon([peak, (peak[0] + slope, peak[1] + cap), (peak[0] - slope, peak[1] + cap)], (246, 248, 252))
    canvas.polygon(_hills(0.82, 0.02, rng), (52, 92, 68))


_SCENES: Final = {"sunset": _sunset, "night": _night, "sea": _sea, "meadow": _meadow, "mountains": _mountains}


def _circle() -> list[Point]:
    return [(math.cos(2 * math.pi * i / 48), math.sin(2 * math.pi * i / 48)) for i in range(48)]


def _star() -> list[Point]:
    radii = (1.16, 0.54)
    return [
        (radii[i % 2] * math.sin(math.pi * i / 5), 0.06 - radii[i % 2] * math.cos(math.pi * i / 5)) for i in range(10)
    ]


def _heart() -> list[Point]:
    angles = [2 * math.pi * i / 48 for i in range(48)]
    return [
        (
            1.04 * math.sin(a) ** 3,
            -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 15.2 - 0.12,
        )
        for a in angles
    ]


def _cross() -> list[Point]:
    long, short = 1.02, 0.36
    return [
        *((-short, -long), (short, -long), (short, -short), (long, -short), (long, short), (short, short)),
        *((short, long), (-short, long), (-short, short), (-long, short), (-long, -short), (-short, -short)),
    ]


_OUTLINES: Final[dict[str, list[Point]]] = {
    "circle": _circle(),
    "square": [(-0.87, -0.87), (0.87, -0.87), (0.87, 0.87), (-0.87, 0.87)],
    "triangle": [(0.0, -1.08), (1.1, 0.84), (-1.1, 0.84)],
    "star": _star(),
    "heart": _heart(),
    "cross": _cross(),
}
