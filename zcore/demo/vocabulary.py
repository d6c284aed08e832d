"""The compositions that the demo model can draw, as values.

A `Composition` describes what is on an image, independent of its wording (`captions.py`) and its pixels (`render.py`).
`random_composition` chooses one. Some colour-shape pairs are held out from training, so that tests can ask for
combinations that the model has never seen.
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
"""Radius of an object as a fraction of the shorter side."""
POSITIONS: Final[Mapping[str, tuple[float, float]]] = {
    "center": (0.5, 0.5),
    "left": (0.25, 0.5),
    "right": (0.75, 0.5),
    "top": (0.5, 0.25),
    "bottom": (0.5, 0.75),
}
"""Center of a single object as a fraction of width and height."""
SCENES: Final = ("sunset", "night", "sea", "meadow", "mountains")
GROUPS: Final[Mapping[int, tuple[tuple[float, float], ...]]] = {
    2: ((0.27, 0.5), (0.73, 0.5)),
    3: ((0.5, 0.28), (0.27, 0.72), (0.73, 0.72)),
    4: ((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)),
}
"""Centers of the objects in a group of 2 to 4."""
PAIRS: Final[Mapping[str, tuple[tuple[float, float], tuple[float, float]]]] = {
    "row": ((0.27, 0.5), (0.73, 0.5)),
    "column": ((0.5, 0.27), (0.5, 0.73)),
}
"""Centers of two different objects; the left or upper one first."""
GROUP_RADIUS: Final = 0.18
LAYOUTS: Final = (*POSITIONS, "two", "three", "four", "row", "column", *SCENES)

COUNT_NAMES: Final[Mapping[int, str]] = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True, order=True)
class Thing:
    """An object: its shape and colour."""

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
"""Colour-shape pairs that are never used in training."""


@dataclass(frozen=True)
class Composition:
    """What an image shows: one object, a group of equal objects, two different objects, or a scene.

    `layout` is one of LAYOUTS. `things` is empty for a scene, has two objects for a pair (left or upper one first), and
    one object otherwise.
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


def random_composition(rng: random.Random, kind: Kind, held_out: bool = False) -> Composition:
    """Return a random composition of this kind, with held-out colour-shape pairs only or without any."""
    if kind == "scene":
        return Composition(rng.choice(SCENES))
    first = _random_thing(rng, held_out)
    background = rng.choice(list(BACKGROUNDS))
    if kind == "count":
        return Composition(rng.choice(list(COUNT_NAMES.values())), (first,), background)
    if kind == "pair":
        second = first
        while second == first:
            second = _random_thing(rng, held_out)
        return Composition(rng.choice(list(PAIRS)), (first, second), background)
    return Composition(rng.choice(list(POSITIONS)), (first,), background, rng.choice(list(SIZES)))


def _random_thing(rng: random.Random, held_out: bool) -> Thing:
    if held_out:
        return rng.choice(sorted(HELD_OUT))
    while True:
        shape = rng.choice((*SHAPES, "star", "cross"))  # the hardest shapes are shown more often
        thing = Thing(shape, rng.choice(list(COLOURS)))
        if thing not in HELD_OUT:
            return thing
