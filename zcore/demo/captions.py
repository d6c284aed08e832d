"""Words for a picture: many ways to ask for the same thing.

Takes a `Picture` and a random generator, gives a caption as a person might type it: terse tags, a sentence, a polite
request, with filler words, with things left out that are as usual (a medium object in the middle on white). Wordings
marked as held out are never used for training, so a test can ask in words that are new to the model.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Final

from zcore.demo.vocabulary import COUNT_NAMES, Picture, Thing

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
"""Words between two objects, and whether they name the right or lower one first."""
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


def caption(picture: Picture, rng: random.Random, held_out: bool = False, long: bool = False) -> str:
    """A way to ask for this picture; `held_out` words it as training never does, `long` pads it with talk."""
    text = _HELD_OUT[picture.kind](picture, rng) if held_out else _SEEN[picture.kind](picture, rng)
    opening = rng.choice(_OPENINGS_HELD_OUT if held_out else _OPENINGS)
    if opening and text.split(" ", 1)[0] in ("on", "against", "in", "with"):
        opening = ""
    if opening.endswith("nice") and text.startswith(("a ", "an ")):
        text = text.split(" ", 1)[1]
    text = f"{opening} {text}".strip() + rng.choice(_ENDINGS_HELD_OUT if held_out else _ENDINGS)
    if long:
        text = _stretch(text, rng)
    if rng.random() < 0.3:
        text = text[:1].upper() + text[1:]
    return text


def chatter(rng: random.Random) -> str:
    """Words that say nothing about the picture, as a system prompt or a thought may."""
    return ", ".join(rng.sample(_FILLERS_LONG, rng.randint(1, 4)))


def _stretch(text: str, rng: random.Random) -> str:
    extra = rng.sample(_FILLERS_LONG, rng.randint(3, 9))
    cut = rng.randint(0, min(2, len(extra)))
    return ", ".join((*extra[:cut], text.rstrip(".!"), *extra[cut:]))


def _object(picture: Picture, rng: random.Random) -> str:
    noun, position, background = _noun(picture, rng), _position(picture, rng), _background(picture, rng)
    form = rng.random()
    if form < 0.55:
        tail = [position, background]
        if rng.random() < 0.25:
            tail.reverse()
        return _join((noun, *tail), rng)
    if form < 0.7:
        return ", ".join(filter(None, (background, noun, position)))
    if form < 0.85:
        thing = picture.things[0]
        tags = [f"{_colour(thing, rng)} {_shape(thing, rng)}", _size(picture, rng), position, background]
        rng.shuffle(tags)
        return ", ".join(filter(None, tags))
    thing = picture.things[0]
    size, shape = _size(picture, rng), _shape(thing, rng)
    said = [f"the {shape} is {_colour(thing, rng)}", f"it is {position}" if position else "", background]
    return ". ".join(filter(None, (_article(f"{size} {shape}"), *said)))


def _object_held_out(picture: Picture, rng: random.Random) -> str:
    thing = picture.things[0]
    noun, position, background = _noun(picture, rng), _position(picture, rng), _background(picture, rng)
    form = rng.randrange(3)
    if form == 0:
        return ", ".join(filter(None, (position, noun, background)))
    if form == 1:
        said = f"{_article(f'{_size(picture, rng)} {_shape(thing, rng)}')} that is {_colour(thing, rng)}"
        return ", ".join(filter(None, (said, background, position)))
    return " and ".join(filter(None, (" ".join(filter(None, (noun, position))), background)))


def _count(picture: Picture, rng: random.Random) -> str:
    return _join((_group(picture, rng), _background(picture, rng)), rng, rng.random() < 0.2)


def _count_held_out(picture: Picture, rng: random.Random) -> str:
    return f"{_group(picture, rng)} and nothing else, {_background(picture, rng)}".rstrip(", ")


def _group(picture: Picture, rng: random.Random) -> str:
    thing = picture.things[0]
    number = next(number for number, name in COUNT_NAMES.items() if name == picture.layout)
    words = [picture.layout, picture.layout, str(number), f"a group of {picture.layout}", f"exactly {picture.layout}"]
    if number == 2:
        words.append("a pair of")
    shape = rng.choice(_SHAPE_WORDS[thing.shape])[1]
    colour = _colour(thing, rng)
    if rng.random() < 0.15:
        return f"{rng.choice(words)} {shape} that are {colour}"
    return " ".join(filter(None, (rng.choice(words), _filler(rng), colour, shape)))


def _pair(picture: Picture, rng: random.Random) -> str:
    return _join((_related(picture, rng), _background(picture, rng)), rng, rng.random() < 0.2)


def _pair_held_out(picture: Picture, rng: random.Random) -> str:
    return f"{_background(picture, rng)} and {_related(picture, rng)}".removeprefix(" and ")


def _related(picture: Picture, rng: random.Random) -> str:
    relation, swapped = rng.choice(_RELATIONS[picture.layout])
    first, second = reversed(picture.things) if swapped else picture.things
    nouns = [
        _article(" ".join(filter(None, (_filler(rng), _colour(thing, rng), _shape(thing, rng)))))
        for thing in (first, second)
    ]
    if rng.random() < 0.15:
        return f"{nouns[0]} that is {relation} {nouns[1]}"
    return f"{nouns[0]} {relation} {nouns[1]}"


def _scene(picture: Picture, rng: random.Random) -> str:
    return rng.choice(_SCENE_PHRASES[picture.layout])


def _scene_held_out(picture: Picture, rng: random.Random) -> str:
    return rng.choice(_SCENE_PHRASES_HELD_OUT[picture.layout])


_SEEN: Final = {"object": _object, "count": _count, "pair": _pair, "scene": _scene}
_HELD_OUT: Final = {
    "object": _object_held_out,
    "count": _count_held_out,
    "pair": _pair_held_out,
    "scene": _scene_held_out,
}


def _noun(picture: Picture, rng: random.Random) -> str:
    thing = picture.things[0]
    size, colour, shape, filler = _size(picture, rng), _colour(thing, rng), _shape(thing, rng), _filler(rng)
    if rng.random() < 0.12:
        words = f"{filler} {size} {shape} in {colour}"
    else:
        words = " ".join((filler, size, colour, shape) if rng.random() < 0.7 else (size, filler, colour, shape))
    return _article(words) if rng.random() < 0.85 else " ".join(words.split())


def _background(picture: Picture, rng: random.Random) -> str:
    if picture.background == "white" and rng.random() < 0.4:
        return ""
    return rng.choice(_BACKGROUND_PHRASES).format(rng.choice(_BACKGROUND_WORDS[picture.background]))


def _position(picture: Picture, rng: random.Random) -> str:
    return rng.choice(_POSITION_PHRASES[picture.layout])


def _size(picture: Picture, rng: random.Random) -> str:
    return rng.choice(_SIZE_WORDS[picture.size])


def _shape(thing: Thing, rng: random.Random) -> str:
    return rng.choice(_SHAPE_WORDS[thing.shape])[0]


def _colour(thing: Thing, rng: random.Random) -> str:
    return rng.choice(_COLOUR_WORDS.get(thing.colour, (thing.colour,)))


def _filler(rng: random.Random) -> str:
    return rng.choice(_FILLERS) if rng.random() < 0.2 else ""


def _article(words: str) -> str:
    words = " ".join(words.split())
    return f"an {words}" if words[:1] in "aeiou" else f"a {words}"


def _join(parts: Sequence[str], rng: random.Random, turned: bool = False) -> str:
    said = [part for part in parts if part]
    if turned:
        return ", ".join(reversed(said))
    return (" " if rng.random() < 0.7 else ", ").join(said)
