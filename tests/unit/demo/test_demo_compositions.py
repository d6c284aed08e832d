"""Rendering and captions of compositions, and the reliability of the checker."""

import random

import numpy as np
import pytest

from zcore.demo.captions import caption
from zcore.demo.check import judge, read, style_of
from zcore.demo.render import Style, render
from zcore.demo.vocabulary import HELD_OUT, Composition, Kind, Thing, random_composition

KINDS: tuple[Kind, ...] = ("object", "count", "pair", "scene")
COUNTS = {(128, 128): 200, (96, 160): 60, (160, 96): 60, (256, 256): 40}


def compositions(count: int, seed: int, held_out: bool = False) -> list[Composition]:
    rng = random.Random(seed)
    return [random_composition(rng, KINDS[i % len(KINDS)], held_out) for i in range(count)]


def test_the_same_seed_draws_the_same_pixels_and_words() -> None:
    first, second = compositions(20, seed=3), compositions(20, seed=3)
    assert first == second
    for composition in first:
        assert (render(composition, 96, 96, random.Random(1)) == render(composition, 96, 96, random.Random(1))).all()
        assert caption(composition, random.Random(1)) == caption(composition, random.Random(1))


def test_another_seed_draws_other_pixels_of_the_same_thing() -> None:
    composition = Composition("left", (Thing("star", "red"),), "beige", "large")
    assert (render(composition, 96, 96, random.Random(1)) != render(composition, 96, 96, random.Random(2))).any()


def test_training_compositions_contain_no_held_out_pair() -> None:
    seen = {thing for composition in compositions(4000, seed=1) for thing in composition.things}
    assert not seen & HELD_OUT
    assert len(seen) == 48 - len(HELD_OUT)
    assert {
        thing for composition in compositions(400, seed=1, held_out=True) for thing in composition.things
    } == HELD_OUT


def test_a_composition_has_many_captions() -> None:
    composition = Composition("left", (Thing("star", "red"),), "beige", "large")
    rng = random.Random(0)
    seen = {caption(composition, rng) for _ in range(300)}
    new = {caption(composition, rng, held_out=True) for _ in range(300)}
    assert len(seen) > 250
    assert not seen & new
    assert all("star" in words.lower() and "red" in words.lower() for words in seen | new)


@pytest.mark.parametrize("size", COUNTS, ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_checker_reads_true_renders_with_almost_no_errors(size: tuple[int, int]) -> None:
    half = COUNTS[size] // 2
    expected = compositions(half, seed=8) + compositions(half, seed=8, held_out=True)
    rng = random.Random(5)
    right = [judge(composition, render(composition, *size, rng)).all_right for composition in expected]
    assert sum(right) >= 0.99 * len(right)


def test_the_checker_finds_every_kind_of_error() -> None:
    def single(
        shape: str, colour: str, layout: str = "left", background: str = "beige", size: str = "large"
    ) -> Composition:
        return Composition(layout, (Thing(shape, colour),), background, size)

    expected = single("star", "red")
    wrong = {
        "shape": single("heart", "red"),
        "colour": single("star", "blue"),
        "position": single("star", "red", layout="right"),
        "background": single("star", "red", background="gray"),
        "size": single("star", "red", size="small"),
    }
    for attribute, composition in wrong.items():
        verdict = judge(expected, render(composition, 128, 128, random.Random(0)))
        assert [name for name, value in vars(verdict).items() if value is False] == [attribute]
    three = Composition("three", (Thing("star", "red"),))
    assert judge(three, render(Composition("four", three.things), 128, 128, random.Random(0))).count is False
    pair = Composition("row", (Thing("star", "red"), Thing("heart", "blue")))
    swapped = Composition("row", pair.things[::-1])
    assert judge(pair, render(swapped, 128, 128, random.Random(0))).pair is False
    assert judge(Composition("sea"), render(Composition("night"), 128, 128, random.Random(0))).scene is False


def test_the_checker_finds_no_object_on_an_empty_background_or_in_noise() -> None:
    assert read(np.full((128, 128, 3), 250, dtype=np.uint8)).objects == ()
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert judge(Composition("center", (Thing("circle", "red"),)), noise).all_right is False


@pytest.mark.parametrize(("style", "least"), [("plain", 0.9), ("outline", 0.97), ("night", 0.97)])
def test_the_checker_distinguishes_the_styles(style: Style, least: float) -> None:
    """Night landscapes and black shapes are excluded, since they look like the styles."""
    expected = [
        composition
        for composition in compositions(160, seed=4)
        if composition.layout != "night" and all(thing.colour != "black" for thing in composition.things)
    ]
    read = [style_of(render(composition, 128, 128, random.Random(1), style)) for composition in expected]
    assert read.count(style) >= least * len(read)
