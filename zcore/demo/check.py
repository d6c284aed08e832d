"""Checker: read the background, the objects and the landscape from the pixels of an image.

`read` returns what is on an image, `judge` compares it with the composition that was asked for. The checker uses plain
rules (nearest palette colour, connected regions, overlap with the rendered shape), so it does not depend on the model
that it judges. On true renders it is right in at least 99 of 100 cases, which a test checks.
"""

import math
import random
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from zcore.demo.render import Pixels, Style, outline_of, render
from zcore.demo.vocabulary import BACKGROUNDS, COLOURS, POSITIONS, SCENES, SHAPES, SIZES, Composition, Thing

Mask = NDArray[np.bool_]

_SIDE_PX: Final = 128
"""Images are scaled to this length of their shorter side before they are read."""
_LEAST_AREA: Final = 0.006
"""Regions smaller than this fraction of the image are specks, not objects."""
_CENTRE_REACH: Final = 0.085
"""Largest distance from the center, as a fraction of the side, at which an object counts as centered."""
_SCENE_REACH: Final = 30.0
"""Largest mean difference (0 to 255) from the average of a landscape at which an image counts as that landscape."""


@dataclass(frozen=True)
class Seen:
    """An object found on an image.

    `radius` is a fraction of the shorter side, `middle` of width and height.
    """

    thing: Thing
    radius: float
    middle: tuple[float, float]
    overlap: float

    @property
    def size(self) -> str:
        return min(SIZES, key=lambda name: abs(math.log(SIZES[name] / self.radius)))

    @property
    def position(self) -> str:
        """Name of the position, decided by the larger offset from the center."""
        x, y = self.middle[0] - 0.5, self.middle[1] - 0.5
        if max(abs(x), abs(y)) < _CENTRE_REACH:
            return "center"
        return min(POSITIONS, key=lambda name: math.dist(self.middle, POSITIONS[name]) if name != "center" else 9.0)


@dataclass(frozen=True)
class Reading:
    """What the checker found: background, objects from left to right, and the landscape, if it looks like one."""

    background: str
    objects: tuple[Seen, ...]
    scene: str | None


@dataclass(frozen=True)
class Verdict:
    """Which attributes are right; None for attributes that this kind of composition does not have."""

    background: bool | None = None
    colour: bool | None = None
    shape: bool | None = None
    position: bool | None = None
    size: bool | None = None
    count: bool | None = None
    pair: bool | None = None
    scene: bool | None = None

    @property
    def all_right(self) -> bool:
        return not any(value is False for value in vars(self).values())


def read(pixels: Pixels) -> Reading:
    """Return what is on an image, given as (H, W, 3) of 0..255."""
    seen = _scaled(pixels)
    background = _background(seen)
    return Reading(background, tuple(sorted(_objects(seen, background), key=lambda o: o.middle)), _scene(seen))


def judge(composition: Composition, pixels: Pixels) -> Verdict:
    """Compare an image, (H, W, 3) of 0..255, with the composition that was asked for."""
    reading = read(pixels)
    if composition.kind == "scene":
        return Verdict(scene=reading.scene == composition.layout)
    background, found = reading.background == composition.background, reading.objects
    if composition.kind == "pair":
        return Verdict(background=background, pair=_is_pair(composition, found))
    things = [o.thing for o in found]
    colour = bool(things) and all(thing.colour == composition.things[0].colour for thing in things)
    shape = bool(things) and all(thing.shape == composition.things[0].shape for thing in things)
    if composition.kind == "count":
        return Verdict(background=background, colour=colour, shape=shape, count=len(found) == composition.count)
    one = found[0] if len(found) == 1 else None
    return Verdict(
        background=background,
        colour=colour,
        shape=shape and one is not None,
        position=one is not None and one.position == composition.layout,
        size=one is not None and one.size == composition.size,
    )


def style_of(pixels: Pixels) -> Style:
    """Return the style of an image: outlines on paper, colours on a dark night background, or plain."""
    seen = pixels.astype(np.float32)
    top, border = seen[:4].reshape(-1, 3), np.concatenate((seen[:4], seen[-4:])).reshape(-1, 3)
    if np.median(top.max(-1)) < 120 and np.median(top[:, 2] - top[:, 0]) > 15:
        return "night"
    colourful, dark = (seen.max(-1) - seen.min(-1) > 100).mean(), (seen.max(-1) < 130).mean()
    if np.median(border.min(-1)) > 225 and colourful < 0.015 and 0.01 < dark < 0.3:
        return "outline"
    return "plain"


def _is_pair(composition: Composition, found: tuple[Seen, ...]) -> bool:
    if len(found) != 2:
        return False
    (x1, y1), (x2, y2) = (o.middle for o in found)
    if composition.layout == "row":
        return abs(x1 - x2) > abs(y1 - y2) and tuple(o.thing for o in found) == composition.things
    ordered = sorted(found, key=lambda o: o.middle[1])
    return abs(y1 - y2) > abs(x1 - x2) and tuple(o.thing for o in ordered) == composition.things


def _scaled(pixels: Pixels) -> NDArray[np.float32]:
    height, width = pixels.shape[:2]
    factor = _SIDE_PX / min(height, width)
    size = (round(width * factor), round(height * factor))
    image = Image.fromarray(pixels)
    return np.asarray(image if size == image.size else image.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)


def _background(pixels: NDArray[np.float32]) -> str:
    height, width = pixels.shape[:2]
    depth = 4
    border = np.ones((height, width), dtype=bool)
    border[depth : height - depth, depth : width - depth] = False
    palette = np.array(list(BACKGROUNDS.values()), dtype=np.float32)
    nearest = _distances(pixels[border], palette).argmin(-1)
    return list(BACKGROUNDS)[int(np.bincount(nearest, minlength=len(palette)).argmax())]


def _objects(pixels: NDArray[np.float32], background: str) -> list[Seen]:
    ground = np.array(BACKGROUNDS[background], dtype=np.float32)
    palette = np.array(list(COLOURS.values()), dtype=np.float32)
    away = np.linalg.norm(pixels - ground, axis=-1)  # (H, W)
    height, width = away.shape
    found: list[Seen] = []
    for region in _regions(away > 48, math.ceil(_LEAST_AREA * height * width)):
        inner = region & (away >= 0.75 * np.percentile(away[region], 90))
        colour = int(np.bincount(_distances(pixels[inner], palette).argmin(-1), minlength=len(palette)).argmax())
        mask = region & (away > 0.5 * np.linalg.norm(palette[colour] - ground))
        if mask.sum() < _LEAST_AREA * height * width:
            continue
        shape, radius, overlap = _shape(mask)
        rows, columns = np.nonzero(mask)
        middle = (float(columns.min() + columns.max() + 1) / 2 / width, float(rows.min() + rows.max() + 1) / 2 / height)
        found.append(Seen(Thing(shape, list(COLOURS)[colour]), radius / min(height, width), middle, overlap))
    return found


def _regions(mask: Mask, least: int) -> list[Mask]:
    """Return the connected regions of at least `least` pixels.

    Labels spread along whole rows and columns until none changes.
    """
    runs = (_runs(mask), _runs(mask.T).T)
    labels = np.where(mask, np.arange(mask.size).reshape(mask.shape), mask.size)
    while True:
        before = labels
        for run in runs:
            smallest = np.full(mask.size + 1, mask.size)
            np.minimum.at(smallest, run, labels)
            labels = np.where(mask, smallest[run], mask.size)
        if (labels == before).all():
            break
    names, sizes = np.unique(labels[mask], return_counts=True)
    return [labels == name for name in names[sizes >= least]]


def _runs(mask: Mask) -> NDArray[np.int64]:
    """Number the pixels so that exactly the adjacent set pixels of a row share a number."""
    breaks = np.ones_like(mask, dtype=np.int64)
    breaks[:, 1:] = ~(mask[:, 1:] & mask[:, :-1])
    return breaks.cumsum().reshape(mask.shape)


def _shape(mask: Mask) -> tuple[str, float, float]:
    """Return the shape that fits this region best, its radius in pixels, and its intersection over union."""
    rows, columns = np.nonzero(mask)
    area = float(mask.sum())
    middle = ((columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2)
    best = ("", 0.0, 0.0)
    for shape in SHAPES:
        radius = math.sqrt(area / _unit_area(shape))
        template = _template(shape, radius, middle, mask.shape)
        overlap = float((mask & template).sum() / (mask | template).sum())
        if overlap > best[2]:
            best = (shape, radius, overlap)
    return best


def _template(shape: str, radius: float, middle: tuple[float, float], size: tuple[int, ...]) -> Mask:
    points = np.array(outline_of(shape))
    offset = (points.min(0) + points.max(0)) / 2  # align the centers of the bounding boxes, not of the circles
    placed = [(float(x), float(y)) for x, y in (points - offset) * radius + middle]
    image = Image.new("1", (size[1], size[0]))
    ImageDraw.Draw(image).polygon([(x - 0.5, y - 0.5) for x, y in placed], fill=1)
    return np.asarray(image, dtype=bool)


@cache
def _unit_area(shape: str) -> float:
    points = outline_of(shape)
    corners = zip(points, [*points[1:], points[0]], strict=True)
    return abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in corners)) / 2


def _scene(pixels: NDArray[np.float32]) -> str | None:
    small = _small(pixels)
    distances = {scene: float(np.abs(small - look).mean()) for scene, look in _looks().items()}
    nearest = min(distances, key=lambda scene: distances[scene])
    return nearest if distances[nearest] <= _SCENE_REACH else None


@cache
def _looks() -> dict[str, NDArray[np.float32]]:
    rng = random.Random(5)
    samples = {scene: [render(Composition(scene), 64, 64, rng) for _ in range(24)] for scene in SCENES}
    return {scene: np.mean([_small(p.astype(np.float32)) for p in images], axis=0) for scene, images in samples.items()}


def _small(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize((8, 8), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float32)


def _distances(colours: NDArray[np.float32], palette: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.linalg.norm(colours[:, None] - palette, axis=-1)  # (N, palette)
