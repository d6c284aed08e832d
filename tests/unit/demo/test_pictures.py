"""What is drawn, how it is asked for, and that the checker can be trusted with it."""

import random

import numpy as np
import pytest

from zcore.demo.captions import caption
from zcore.demo.check import judge, read, style_of
from zcore.demo.render import Style, render
from zcore.demo.vocabulary import HELD_OUT, Kind, Picture, Thing, draw_picture

KINDS: tuple[Kind, ...] = ("object", "count", "pair", "scene")
COUNTS = {(128, 128): 200, (96, 160): 60, (160, 96): 60, (256, 256): 40}


def pictures(count: int, seed: int, held_out: bool = False) -> list[Picture]:
    rng = random.Random(seed)
    return [draw_picture(rng, KINDS[i % len(KINDS)], held_out) for i in range(count)]


def test_the_same_seed_draws_the_same_pixels_and_words() -> None:
    first, second = pictures(20, seed=3), pictures(20, seed=3)
    assert first == second
    for picture in first:
        assert (render(picture, 96, 96, random.Random(1)) == render(picture, 96, 96, random.Random(1))).all()
        assert caption(picture, random.Random(1)) == caption(picture, random.Random(1))


def test_another_seed_draws_other_pixels_of_the_same_thing() -> None:
    picture = Picture("left", (Thing("star", "red"),), "beige", "large")
    assert (render(picture, 96, 96, random.Random(1)) != render(picture, 96, 96, random.Random(2))).any()


def test_a_picture_for_training_never_shows_a_held_out_pair() -> None:
    seen = {thing for picture in pictures(4000, seed=1) for thing in picture.things}
    assert not seen & HELD_OUT
    assert len(seen) == 48 - len(HELD_OUT)
    assert {thing for picture in pictures(400, seed=1, held_out=True) for thing in picture.things} == HELD_OUT


def test_one_picture_can_be_asked_for_in_many_ways() -> None:
    picture = Picture("left", (Thing("star", "red"),), "beige", "large")
    rng = random.Random(0)
    seen = {caption(picture, rng) for _ in range(300)}
    new = {caption(picture, rng, held_out=True) for _ in range(300)}
    assert len(seen) > 250
    assert not seen & new
    assert all("star" in words.lower() and "red" in words.lower() for words in seen | new)


@pytest.mark.parametrize("size", COUNTS, ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_checker_reads_true_pictures_almost_without_fault(size: tuple[int, int]) -> None:
    half = COUNTS[size] // 2
    asked = pictures(half, seed=8) + pictures(half, seed=8, held_out=True)
    rng = random.Random(5)
    right = [judge(picture, render(picture, *size, rng)).all_right for picture in asked]
    assert sum(right) >= 0.99 * len(right)


def test_the_checker_notices_what_is_wrong() -> None:
    def drawn(shape: str, colour: str, layout: str = "left", background: str = "beige", size: str = "large") -> Picture:
        return Picture(layout, (Thing(shape, colour),), background, size)

    asked = drawn("star", "red")
    wrong = {
        "shape": drawn("heart", "red"),
        "colour": drawn("star", "blue"),
        "position": drawn("star", "red", layout="right"),
        "background": drawn("star", "red", background="gray"),
        "size": drawn("star", "red", size="small"),
    }
    for fault, picture in wrong.items():
        verdict = judge(asked, render(picture, 128, 128, random.Random(0)))
        assert [name for name, said in vars(verdict).items() if said is False] == [fault]
    three = Picture("three", (Thing("star", "red"),))
    assert judge(three, render(Picture("four", three.things), 128, 128, random.Random(0))).count is False
    pair = Picture("row", (Thing("star", "red"), Thing("heart", "blue")))
    turned = Picture("row", pair.things[::-1])
    assert judge(pair, render(turned, 128, 128, random.Random(0))).pair is False
    assert judge(Picture("sea"), render(Picture("night"), 128, 128, random.Random(0))).scene is False


def test_the_checker_sees_nothing_on_an_empty_ground_and_no_object_in_noise() -> None:
    assert read(np.full((128, 128, 3), 250, dtype=np.uint8)).objects == ()
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert judge(Picture("center", (Thing("circle", "red"),)), noise).all_right is False


@pytest.mark.parametrize(("style", "least"), [("plain", 0.9), ("outline", 0.97), ("night", 0.97)])
def test_the_checker_tells_the_styles_apart(style: Style, least: float) -> None:
    """Left out are a landscape at night and black shapes on white, which look like the styles without being so."""
    asked = [
        picture
        for picture in pictures(160, seed=4)
        if picture.layout != "night" and all(thing.colour != "black" for thing in picture.things)
    ]
    read = [style_of(render(picture, 128, 128, random.Random(1), style)) for picture in asked]
    assert read.count(style) >= least * len(read)
