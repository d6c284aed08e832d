"""Captions: many ways to ask for the same image.

`caption` words a composition as a person might type it: terse tags, a sentence or a polite request, with filler words,
and without the defaults (a medium object in the center on white). Held-out wordings are never used for training, so
that tests can ask in words that are new to the model.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Final

from zcore.demo.vocabulary import COUNT_NAMES, Composition, Thing

_SHAPE_WORDS: Final[Mapping[str, tuple[tuple[str, str], ...]]] = {
    "circle": (("circle", "circles"), ("disc", "discs"), ("ball", "balls"), ("circle", "circles")),
    "square": (("square", "squares"), ("square", "squares"), ("box", "boxes")),
    "triangle": (("triangle", "triangles"),),
    "star": (("star", "stars"),),
    "heart": (("heart", "hearts"),),
    "cross": (("cross", "crosses"), ("cross", "crosses"), ("plus sign", "plus signs")),
}
_COLOUR_WORDS: Final[Mapping[str, tuple[str, ...]]] = {"purple": ("purple", "purple", "violet")}
_SIZE_WORDS: Final[Mapping[str, tuple[str, ...]]] = {
    "small": ("small", "small", "tiny", "little"),
    "medium": ("", "", "", "medium", "medium-sized"),
    "large": ("large", "large", "big", "huge"),
}
_BACKGROUND_WORDS: Final[Mapping[str, tuple[str, ...]]] = {
    "white": ("white",),
    "gray": ("gray", "grey", "light gray"),
    "beige": ("beige", "beige", "cream"),
    "light blue": ("light blue", "sky blue", "pale blue", "blue"),
    "light green": ("light green", "mint green", "pale green", "green"),
}
_BACKGROUND_PHRASES: Final = (
    "on a {} background",
    "on a {} background",
    "on {}",
    "with a {} background",
    "{} background",
    "against a {} background",
    "in front of a {} background",
    "the background is {}",
)
_POSITION_PHRASES: Final[Mapping[str, tuple[str, ...]]] = {
    "center": ("", "", "in the center", "in the middle", "at the center", "centered", "in the centre"),
    "left": ("on the left", "on the left side", "at the left", "to the left", "on the left hand side", "left"),
    "right": ("on the right", "on the right side", "at the right", "to the right", "on the right hand side", "right"),
    "top": ("at the top", "near the top", "on top", "in the upper part", "up at the top", "top"),
    "bottom": (
        "at the bottom",
        "near the bottom",
        "in the lower part",
        "down at the bottom",
        "at the very bottom",
        "bottom",
    ),
}
_RELATIONS: Final[Mapping[str, tuple[tuple[str, bool], ...]]] = {
    "row": (
        ("left of", False),
        ("to the left of", False),
        ("on the left of", False),
        ("right of", True),
        ("to the right of", True),
        ("on the right of", True),
    ),
    "column": (
        ("above", False),
        ("over", False),
        ("on top of", False),
        ("below", True),
        ("under", True),
        ("beneath", True),
    ),
}
"""Words between two objects, and whether the right or lower object is named first."""
_SCENE_PHRASES: Final[Mapping[str, tuple[str, ...]]] = {
    "sunset": (
        "a sunset",
        "sunset",
        "a sunset over the hills",
        "the sun going down",
        "an evening sky at sunset",
        "a red sunset",
    ),
    "night": (
        "a night sky",
        "night",
        "a starry night",
        "the moon at night",
        "a night with moon and stars",
        "a dark night sky",
    ),
    "sea": (
        "the sea",
        "the ocean",
        "a calm sea",
        "the sea under a blue sky",
        "waves on the ocean",
        "a blue sea in the sun",
    ),
    "meadow": (
        "a meadow",
        "a green meadow",
        "a field of grass",
        "green hills",
        "a meadow under a blue sky",
        "a grassy field",
    ),
    "mountains": (
        "mountains",
        "snowy mountains",
        "a mountain landscape",
        "high mountains",
        "mountains with snow",
        "a mountain",
    ),
}
_SCENE_PHRASES_HELD_OUT: Final[Mapping[str, tuple[str, ...]]] = {
    "sunset": ("a beautiful sunset over green hills", "hills at sunset", "the evening sun going down over the hills"),
    "night": ("a dark starry night", "the moon in a night sky", "stars and the moon in the night sky"),
    "sea": ("a calm blue ocean", "waves on a calm sea", "the ocean under the sun"),
    "meadow": ("green grass in a meadow", "a field of green grass", "a green field under a blue sky"),
    "mountains": ("a landscape with snowy mountains", "high snowy mountains", "snow on the mountains"),
}
_OPENINGS: Final = (
    *("", "", "", "", "", ""),
    *("a picture of", "an image of", "a drawing of", "an illustration of", "a painting of", "a simple drawing of"),
    *("draw", "paint", "make", "show me", "please draw", "please paint", "I want", "create", "generate", "give me"),
    *("can you draw", "there is", "a photo of", "a render of", "a cute picture of", "I would like to see", "now draw"),
)
_OPENINGS_HELD_OUT: Final = (
    "please make a picture of",
    "can you paint me",
    "I would like an image of",
    "show a drawing of",
    "a nice",
)
_ENDINGS: Final = (
    *("", "", "", "", "", "", "", "", ".", ".", "!"),
    *(
        ", please",
        " please",
        ", flat design",
        ", high quality",
        ", minimal",
        ", vector art",
        ", simple style",
        ", thank you",
    ),
    *(", 4k", ", very detailed", ", clean lines", ", beautiful", " for my book", " for a child", ", digital art"),
)
_ENDINGS_HELD_OUT: Final = (", simple and clean", ", please.", ", nice colors", " for my wall", ", flat and minimal")
_FILLERS: Final = (
    *("nice", "cute", "beautiful", "simple", "lovely", "plain", "single", "bright", "clean", "pretty"),
    *("modern", "flat", "great", "perfect", "good", "very", "really", "just", "some", "my", "your", "our", "this"),
    *("that", "one", "new", "old", "happy", "friendly", "smooth", "sharp", "soft", "elegant", "colorful"),
    *("detailed", "realistic", "professional", "stunning", "amazing", "minimal", "geometric"),
    *("quick", "fresh", "warm", "cool", "fine", "sweet", "tidy", "crisp", "shiny", "glossy", "matte", "neat"),
)
_FILLERS_LONG: Final = (
    "high quality",
    "in the style of a children's book",
    "made for a school poster",
    "very simple and clean",
    "with soft light",
    "drawn by hand with great care",
    "as a sticker for my laptop",
    "it should look nice",
    "nothing else in the picture",
    "thank you very much",
    "as one would see it in a museum",
    "best of the year",
    "award winning design",
    "sharp focus and smooth edges",
    "I need it for my web page",
    "keep it friendly and modern",
    "something that people like to look at",
    "professional work, no text",
)


def caption(composition: Composition, rng: random.Random, held_out: bool = False, long: bool = False) -> str:
    """Return a caption for this composition.

    `held_out` selects wordings that training never uses; `long` pads the caption with irrelevant phrases.
    """
    text = _HELD_OUT[composition.kind](composition, rng) if held_out else _SEEN[composition.kind](composition, rng)
    opening = rng.choice(_OPENINGS_HELD_OUT if held_out else _OPENINGS)
    if opening and text.split(" ", 1)[0] in ("on", "against", "in", "with"):
        opening = ""
    if opening.endswith("nice") and text.startswith(("a ", "an ")):
        text = text.split(" ", 1)[1]
    text = f"{opening} {text}".strip() + rng.choice(_ENDINGS_HELD_OUT if held_out else _ENDINGS)
    if long:
        text = _pad(text, rng)
    if rng.random() < 0.3:
        text = text[:1].upper() + text[1:]
    return text


def chatter(rng: random.Random) -> str:
    """Return phrases that do not describe the image, for system prompts and thoughts."""
    return ", ".join(rng.sample(_FILLERS_LONG, rng.randint(1, 4)))


def _pad(text: str, rng: random.Random) -> str:
    extra = rng.sample(_FILLERS_LONG, rng.randint(3, 9))
    cut = rng.randint(0, min(2, len(extra)))
    return ", ".join((*extra[:cut], text.rstrip(".!"), *extra[cut:]))


def _object(composition: Composition, rng: random.Random) -> str:
    noun, position, background = _noun(composition, rng), _position(composition, rng), _background(composition, rng)
    form = rng.random()
    if form < 0.55:
        tail = [position, background]
        if rng.random() < 0.25:
            tail.reverse()
        return _join((noun, *tail), rng)
    if form < 0.7:
        return ", ".join(filter(None, (background, noun, position)))
    if form < 0.85:
        thing = composition.things[0]
        tags = [f"{_colour(thing, rng)} {_shape(thing, rng)}", _size(composition, rng), position, background]
        rng.shuffle(tags)
        return ", ".join(filter(None, tags))
    thing = composition.things[0]
    size, shape = _size(composition, rng), _shape(thing, rng)
    sentences = [f"the {shape} is {_colour(thing, rng)}", f"it is {position}" if position else "", background]
    return ". ".join(filter(None, (_article(f"{size} {shape}"), *sentences)))


def _object_held_out(composition: Composition, rng: random.Random) -> str:
    thing = composition.things[0]
    noun, position, background = _noun(composition, rng), _position(composition, rng), _background(composition, rng)
    form = rng.randrange(3)
    if form == 0:
        return ", ".join(filter(None, (position, noun, background)))
    if form == 1:
        noun = f"{_article(f'{_size(composition, rng)} {_shape(thing, rng)}')} that is {_colour(thing, rng)}"
        return ", ".join(filter(None, (noun, background, position)))
    return " and ".join(filter(None, (" ".join(filter(None, (noun, position))), background)))


def _count(composition: Composition, rng: random.Random) -> str:
    return _join((_group(composition, rng), _background(composition, rng)), rng, rng.random() < 0.2)


def _count_held_out(composition: Composition, rng: random.Random) -> str:
    return f"{_group(composition, rng)} and nothing else, {_background(composition, rng)}".rstrip(", ")


def _group(composition: Composition, rng: random.Random) -> str:
    thing = composition.things[0]
    number = next(number for number, name in COUNT_NAMES.items() if name == composition.layout)
    words = [
        composition.layout,
        composition.layout,
        str(number),
        f"a group of {composition.layout}",
        f"exactly {composition.layout}",
    ]
    if number == 2:
        words.append("a pair of")
    shape = rng.choice(_SHAPE_WORDS[thing.shape])[1]
    colour = _colour(thing, rng)
    if rng.random() < 0.15:
        return f"{rng.choice(words)} {shape} that are {colour}"
    return " ".join(filter(None, (rng.choice(words), _filler(rng), colour, shape)))


def _pair(composition: Composition, rng: random.Random) -> str:
    return _join((_related(composition, rng), _background(composition, rng)), rng, rng.random() < 0.2)


def _pair_held_out(composition: Composition, rng: random.Random) -> str:
    return f"{_background(composition, rng)} and {_related(composition, rng)}".removeprefix(" and ")


def _related(composition: Composition, rng: random.Random) -> str:
    relation, swapped = rng.choice(_RELATIONS[composition.layout])
    first, second = reversed(composition.things) if swapped else composition.things
    nouns = [
        _article(" ".join(filter(None, (_filler(rng), _colour(thing, rng), _shape(thing, rng)))))
        for thing in (first, second)
    ]
    if rng.random() < 0.15:
        return f"{nouns[0]} that is {relation} {nouns[1]}"
    return f"{nouns[0]} {relation} {nouns[1]}"


def _scene(composition: Composition, rng: random.Random) -> str:
    return rng.choice(_SCENE_PHRASES[composition.layout])


def _scene_held_out(composition: Composition, rng: random.Random) -> str:
    return rng.choice(_SCENE_PHRASES_HELD_OUT[composition.layout])


_SEEN: Final = {"object": _object, "count": _count, "pair": _pair, "scene": _scene}
_HELD_OUT: Final = {
    "object": _object_held_out,
    "count": _count_held_out,
    "pair": _pair_held_out,
    "scene": _scene_held_out,
}


def _noun(composition: Composition, rng: random.Random) -> str:
    thing = composition.things[0]
    size, colour, shape, filler = _size(composition, rng), _colour(thing, rng), _shape(thing, rng), _filler(rng)
    if rng.random() < 0.12:
        words = f"{filler} {size} {shape} in {colour}"
    else:
        words = " ".join((filler, size, colour, shape) if rng.random() < 0.7 else (size, filler, colour, shape))
    return _article(words) if rng.random() < 0.85 else " ".join(words.split())


def _background(composition: Composition, rng: random.Random) -> str:
    if composition.background == "white" and rng.random() < 0.4:
        return ""
    return rng.choice(_BACKGROUND_PHRASES).format(rng.choice(_BACKGROUND_WORDS[composition.background]))


def _position(composition: Composition, rng: random.Random) -> str:
    return rng.choice(_POSITION_PHRASES[composition.layout])


def _size(composition: Composition, rng: random.Random) -> str:
    return rng.choice(_SIZE_WORDS[composition.size])


def _shape(thing: Thing, rng: random.Random) -> str:
    return rng.choice(_SHAPE_WORDS[thing.shape])[0]


def _colour(thing: Thing, rng: random.Random) -> str:
    return rng.choice(_COLOUR_WORDS.get(thing.colour, (thing.colour,)))


def _filler(rng: random.Random) -> str:
    return rng.choice(_FILLERS) if rng.random() < 0.2 else ""


def _article(words: str) -> str:
    words = " ".join(words.split())
    return f"an {words}" if words[:1] in "aeiou" else f"a {words}"


def _join(parts: Sequence[str], rng: random.Random, backwards: bool = False) -> str:
    words = [part for part in parts if part]
    if backwards:
        return ", ".join(reversed(words))
    return (" " if rng.random() < 0.7 else ", ").join(words)
