"""What the demo model can paint: the whole of its world as values.

A `Picture` says what is on a picture without saying how it is worded (`captions.py`) or drawn (`render.py`). This
module draws pictures by seed and keeps some colour-shape pairs back, so that a test can ask for what training never
showed. It knows no pixels and no tensors.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

Colour = tuple[int, int, int]
Kind = Literal["object", "count", "pair", "scene"]

SHAPES: Final = ("circle", "square", "triangle", "star", "heart", "cross")
COLOURS: Final[Mapping[str, Colour]] = {
    "red": (215, 35, 40),
    "orange": (245, 130, 20),
    "yellow": (250, 210, 30),
    "green": (30, 150, 60),
    "blue": (35, 75, 215),
    "purple": (130, 50, 165),
    "pink": (250, 110, 185),
    "black": (25, 25, 30),
}
BACKGROUNDS: Final[Mapping[str, Colour]] = {
    "white": (250, 250, 250),
    "gray": (165, 165, 170),
    "beige": (232, 208, 165),
    "light blue": (160, 212, 242),
    "light green": (172, 235, 178),
}
SIZES: Final[Mapping[str, float]] = {"small": 0.17, "medium": 0.235, "large": 0.31}
"""Radius of an object as a part of the picture's shorter side."""
POSITIONS: Final[Mapping[str, tuple[float, float]]] = {
    "center": (0.5, 0.5),
    "left": (0.25, 0.5),
    "right": (0.75, 0.5),
    "top": (0.5, 0.25),
    "bottom": (0.5, 0.75),
}
"""Middle of a single object as a part of width and height."""
SCENES: Final = ("sunset", "night", "sea", "meadow", "mountains")
GROUPS: Final[Mapping[int, tuple[tuple[float, float], ...]]] = {
    2: ((0.27, 0.5), (0.73, 0.5)),
    3: ((0.5, 0.28), (0.27, 0.72), (0.73, 0.72)),
    4: ((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)),
}
"""Where the objects of a group of 2 to 4 stand."""
PAIRS: Final[Mapping[str, tuple[tuple[float, float], tuple[float, float]]]] = {
    "row": ((0.27, 0.5), (0.73, 0.5)),
    "column": ((0.5, 0.27), (0.5, 0.73)),
}
"""Where two different objects stand: the first is the left or the upper one."""
GROUP_RADIUS: Final = 0.18
LAYOUTS: Final = (*POSITIONS, "two", "three", "four", "row", "column", *SCENES)

COUNT_NAMES: Final[Mapping[int, str]] = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True, order=True)
class Thing:
    """One object: what it is and which colour it has."""

    shape: str
    colour: str


HELD_OUT: Final = frozenset(
    {
        Thing("circle", "purple"),
        Thing("square", "orange"),
        Thing("square", "pink"),
        Thing("triangle", "yellow"),
        Thing("star", "green"),
        Thing("heart", "blue"),
        Thing("cross", "black"),
        Thing("cross", "purple"),
    }
)
"""Colour-shape pairs that training never shows."""


@dataclass(frozen=True)
class Picture:
    """What is on a picture: one object, a group of equal ones, two different ones, or a scene.

    `layout` is one of LAYOUTS and says which; `things` holds no object for a scene, two for a pair (left or upper
    first), else one.
    """

    layout: str
    things: tuple[Thing, ...] = ()
    background: str = "white"
    size: str = "medium"

    @property
    def kind(self) -> Kind:
        if self.layout in POSITIONS:
            return "object"
        if self.layout in COUNT_NAMES.values():
            return "count"
        return "pair" if self.layout in PAIRS else "scene"

    @property
    def count(self) -> int:
        return {"object": 1, "pair": 2, "scene": 0}.get(self.kind) or next(
            (number for number, name in COUNT_NAMES.items() if name == self.layout), 0
        )


def draw_picture(rng: random.Random, kind: Kind, held_out: bool = False) -> Picture:
    """A picture of this kind at random; of seen colour-shape pairs only, or of held-out ones only."""
    if kind == "scene":
        return Picture(rng.choice(SCENES))
    first = _draw_thing(rng, held_out)
    background = rng.choice(list(BACKGROUNDS))
    if kind == "count":
        return Picture(rng.choice(list(COUNT_NAMES.values())), (first,), background)
    if kind == "pair":
        second = first
        while second == first:
            second = _draw_thing(rng, held_out)
        return Picture(rng.choice(list(PAIRS)), (first, second), background)
    return Picture(rng.choice(list(POSITIONS)), (first,), background, rng.choice(list(SIZES)))


def _draw_thing(rng: random.Random, held_out: bool) -> Thing:
    if held_out:
        return rng.choice(sorted(HELD_OUT))
    while True:
        shape = rng.choice((*SHAPES, "star", "cross"))  # the hardest to paint are shown more often
        thing = Thing(shape, rng.choice(list(COLOURS)))
        if thing not in HELD_OUT:
            return thing
