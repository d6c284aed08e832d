"""Stage `evaluate`: what the exported model really paints.

Loads a folder with the unmodified `ZImagePipeline`, asks for pictures whose colour-shape pairs and wordings training
never showed, lets the checker judge them, and writes a table and a grid to look at. Guidance 0, fixed seeds. Takes a
folder, knows nothing of training.
"""

import csv
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image, ImageDraw

from zcore.demo.captions import caption
from zcore.demo.check import Verdict, judge, style_of
from zcore.demo.footprint import footprint
from zcore.demo.lora import merge
from zcore.demo.render import Pixels, render
from zcore.demo.stock import load
from zcore.demo.vocabulary import Kind, Picture, draw_picture

KINDS: Final[tuple[Kind, ...]] = ("object", "object", "count", "pair", "scene")
MEASURES: Final = (
    ("object", "background"),
    ("object", "colour"),
    ("object", "shape"),
    ("object", "position"),
    ("object", "size"),
    ("scene", "scene"),
    ("count", "count"),
    ("pair", "pair"),
)
_BATCH: Final = 8


@dataclass(frozen=True)
class Ask:
    """One thing to paint and the words for it."""

    picture: Picture
    text: str
    seed: int


@dataclass(frozen=True)
class Trial:
    """One way of painting: size in pixels, steps, precision, and how many of the captions it is tried on."""

    name: str
    width: int = 128
    height: int = 128
    steps: int = 8
    dtype: torch.dtype = torch.float32
    share: float = 1.0


TRIALS: Final = (
    Trial("128x128"),
    Trial("bfloat16", dtype=torch.bfloat16, share=0.25),
    Trial("30 steps", steps=30, share=0.25),
    Trial("96x160", 96, 160),
    Trial("160x96", 160, 96, share=0.25),
    Trial("256x256", 256, 256),
)


def evaluate(folder: Path, grid: Path | None = None, count: int = 400, held_out: bool = True) -> str:
    """Every figure of the model in this folder as a Markdown table; the grid is written where asked for."""
    asks = draw_asks(count, held_out)
    figures: dict[str, dict[str, str]] = {"checker on true renders": true_renders(asks)}
    for trial in TRIALS:
        pipeline = load(folder, trial.dtype)
        chosen = asks[: round(count * trial.share)]
        painted = paint_all(pipeline, chosen, trial)
        figures[trial.name] = _shares([judge(a.picture, p) for a, p in zip(chosen, painted, strict=True)], chosen)
        if grid and trial is TRIALS[0]:
            draw_grid(pipeline, grid)
    rows = [
        "| size | seconds to load | seconds a picture | MiB before loading | MiB at the peak |",
        "|---|---|---|---|---|",
    ]
    for side in (128, 256):
        cost = footprint(folder, side, side)
        numbers = f"{cost['load_s']:.2f} | {cost['picture_s']:.2f} | {cost['before_mib']:.0f} | {cost['peak_mib']:.0f}"
        rows.append(f"| {side}x{side} | {numbers} |")
    return "\n\n".join((_table(figures), "\n".join(rows)))


def draw_asks(count: int, held_out: bool = True, seed: int = 2024) -> list[Ask]:
    """Captions with what they ask for; the kinds take turns, so any beginning of the list has all of them."""
    rng = random.Random(seed)
    pictures = [draw_picture(rng, KINDS[i % len(KINDS)], held_out) for i in range(count)]
    return [Ask(picture, caption(picture, rng, held_out), seed + i) for i, picture in enumerate(pictures)]


def paint_all(pipeline: Any, asks: Sequence[Ask], trial: Trial) -> list[Pixels]:
    """Paint every ask with its own seed."""
    painted: list[Pixels] = []
    for start in range(0, len(asks), _BATCH):
        part = asks[start : start + _BATCH]
        output = pipeline(
            [ask.text for ask in part],
            width=trial.width,
            height=trial.height,
            num_inference_steps=trial.steps,
            guidance_scale=0.0,
            max_sequence_length=128,
            generator=[torch.Generator().manual_seed(ask.seed) for ask in part],
            output_type="np",
        )
        painted += [(image * 255).round().astype(np.uint8) for image in output.images]
    return painted


def true_renders(asks: Sequence[Ask]) -> dict[str, str]:
    """The checker on what it should read without fault: rendered pictures of the same asks."""
    drawn = [render(ask.picture, 128, 128, random.Random(ask.seed)) for ask in asks]
    return _shares([judge(ask.picture, pixels) for ask, pixels in zip(asks, drawn, strict=True)], asks)


def evaluate_loras(folder: Path, loras: Path, grid: Path | None = None, count: int = 60) -> str:
    """How many pictures take each LoRA's style, without it and with it, as a Markdown table; no caption names it."""
    asks = [ask for ask in draw_asks(2 * count, held_out=False, seed=5) if ask.picture.layout != "night"]
    asks = [ask for ask in asks if all(thing.colour != "black" for thing in ask.picture.things)][:count]
    rows = ["| LoRA | pictures in its style without it | with it |", "|---|---|---|"]
    painted = {"": paint_all(load(folder), asks, TRIALS[0])}
    for path in sorted(loras.glob("*.safetensors")):
        pipeline = load(folder)
        merge(pipeline.transformer, path)
        painted[path.stem] = paint_all(pipeline, asks, TRIALS[0])
        style = path.stem.rpartition("-")[2]
        shares = [[style_of(pixels) for pixels in painted[name]].count(style) / len(asks) for name in ("", path.stem)]
        rows.append(f"| {path.stem} | {100 * shares[0]:.0f} % | {100 * shares[1]:.0f} % |")
    if grid:
        sheet = np.concatenate([np.concatenate(pictures[:8], 1) for pictures in painted.values()])
        Image.fromarray(sheet).save(grid, optimize=True)
    return "\n".join(rows)


GRID_TEXTS: Final = (
    "a red circle",
    "a large blue square on a beige background",
    "a green triangle on the left",
    "a yellow star on a gray background",
    "a small pink heart at the top",
    "a black cross on the right, light green background",
    "three orange circles",
    "two red hearts on a light blue background",
    "four green squares on a gray background",
    "a red star above a blue circle",
    "a yellow heart left of a purple triangle",
    "an orange square below a black circle on a light green background",
    "a sunset",
    "a starry night",
    "the sea",
    "a green meadow",
    "snowy mountains",
    "please paint me a big purple star, thank you",
    "a tiny blue heart at the bottom",
    "orange square, centered, beige background",
    "a cat",
    "the word HELLO",
    "five red stars",
    "a striped circle",
)


def draw_grid(pipeline: Any, path: Path, texts: Sequence[str] = GRID_TEXTS, columns: int = 6) -> None:
    """Paint these captions side by side with their words; the last four show what the model cannot."""
    asks = [Ask(Picture("center"), text, 7 + i) for i, text in enumerate(texts)]
    painted = paint_all(pipeline, asks, TRIALS[0])
    side, words = 128, 30
    rows = -(-len(texts) // columns)
    sheet = Image.new("RGB", (columns * (side + 12) + 12, rows * (side + words + 8) + 8), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for index, (ask, pixels) in enumerate(zip(asks, painted, strict=True)):
        x, y = 12 + index % columns * (side + 12), 8 + index // columns * (side + words + 8)
        sheet.paste(Image.fromarray(pixels), (x, y))
        pen.rectangle((x - 1, y - 1, x + side, y + side), outline=(200, 200, 200))
        pen.multiline_text((x, y + side + 3), _wrapped(ask.text, 24), fill=(40, 40, 40), font_size=10, spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


CURVES: Final = {
    "object": (215, 35, 40),
    "object_held_out": (245, 130, 20),
    "scene": (30, 150, 60),
    "count": (35, 75, 215),
    "pair": (130, 50, 165),
    "pair_96x160": (190, 130, 215),
    "pair_256x256": (90, 90, 95),
}
"""Columns of the transformer's log that are drawn, and in which colour."""


def draw_curves(log: Path, path: Path) -> None:
    """Draw the shares of right pictures over the samples seen, from the transformer's CSV."""
    rows = list(csv.DictReader(log.read_text().splitlines()))
    width, height, left, top = 720, 300, 60, 20
    sheet = Image.new("RGB", (width + left + 150, height + top + 50), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    most = max(float(row["samples"]) for row in rows)

    def place(row: dict[str, str], name: str) -> tuple[float, float]:
        return left + width * float(row["samples"]) / most, top + height * (1 - float(row[name]))

    for share in (0, 0.25, 0.5, 0.75, 1):
        y = top + height * (1 - share)
        pen.line((left, y, left + width, y), fill=(220, 220, 220))
        pen.text((left - 40, y - 6), f"{100 * share:.0f} %", fill=(60, 60, 60), font_size=11)
    for index, (name, colour) in enumerate(CURVES.items()):
        pen.line([place(row, name) for row in rows if row.get(name)], fill=colour, width=2)
        pen.text((left + width + 12, top + 20 * index), name.replace("_", " "), fill=colour, font_size=13)
    pen.text(
        (left, top + height + 12),
        f"samples seen, 0 to {most:.0f}; 16 to 48 captions a point, averaged weights",
        fill=(60, 60, 60),
    )
    sheet.save(path, optimize=True)


def _wrapped(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _shares(verdicts: Sequence[Verdict], asks: Sequence[Ask]) -> dict[str, str]:
    right: dict[str, list[bool]] = defaultdict(list)
    for verdict, ask in zip(verdicts, asks, strict=True):
        for kind, measure in MEASURES:
            said: bool | None = getattr(verdict, measure)
            if kind == ask.picture.kind and said is not None:
                right[measure].append(said)
        right[f"all right, {ask.picture.kind}"].append(verdict.all_right)
    return {name: f"{100 * sum(said) / len(said):.1f} % ({sum(said)}/{len(said)})" for name, said in right.items()}


def _table(figures: dict[str, dict[str, str]]) -> str:
    names = list(dict.fromkeys(name for column in figures.values() for name in column))
    head = f"| | {' | '.join(figures)} |\n|---|{'---|' * len(figures)}"
    rows = [f"| {name} | {' | '.join(column.get(name, '') for column in figures.values())} |" for name in names]
    return "\n".join((head, *rows))
