"""Stage `evaluate`: measure how well the exported model follows its prompts.

Loads a folder with the unmodified `ZImagePipeline`, generates images for colour-shape pairs and wordings that training
never showed, judges them with the checker, and returns Markdown tables and draws a grid. Guidance 0, fixed seeds.
Independent of the training.
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
from zcore.demo.render import Pixels, render
from zcore.demo.stock import load
from zcore.demo.train_lora import merge
from zcore.demo.vocabulary import Composition, Kind, random_composition

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
class Case:
    """A composition to generate, its caption and its seed."""

    composition: Composition
    text: str
    seed: int


@dataclass(frozen=True)
class Trial:
    """Settings to generate with: size in pixels, steps, dtype, and the share of the captions to use."""

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
    """Return all figures of the model in this folder as Markdown tables. Draws the grid if a path is given."""
    cases = draw_cases(count, held_out)
    figures: dict[str, dict[str, str]] = {"checker on true renders": true_renders(cases)}
    for trial in TRIALS:
        pipeline = load(folder, trial.dtype)
        chosen = cases[: round(count * trial.share)]
        images = generate_all(pipeline, chosen, trial)
        figures[trial.name] = _shares(
            [judge(case.composition, p) for case, p in zip(chosen, images, strict=True)], chosen
        )
        if grid and trial is TRIALS[0]:
            draw_grid(pipeline, grid)
    rows = [
        "| size | seconds to load | seconds per image | MiB before loading | MiB at the peak |",
        "|---|---|---|---|---|",
    ]
    for side in (128, 256):
        cost = footprint(folder, side, side)
        numbers = f"{cost['load_s']:.2f} | {cost['image_s']:.2f} | {cost['before_mib']:.0f} | {cost['peak_mib']:.0f}"
        rows.append(f"| {side}x{side} | {numbers} |")
    return "\n\n".join((_table(figures), "\n".join(rows)))


def draw_cases(count: int, held_out: bool = True, seed: int = 2024) -> list[Case]:
    """Return random compositions with captions. The kinds alternate, so every prefix of the list has all of them."""
    rng = random.Random(seed)
    compositions = [random_composition(rng, KINDS[i % len(KINDS)], held_out) for i in range(count)]
    return [Case(one, caption(one, rng, held_out), seed + i) for i, one in enumerate(compositions)]


def generate_all(pipeline: Any, cases: Sequence[Case], trial: Trial) -> list[Pixels]:
    """Generate an image for each case with its seed."""
    images: list[Pixels] = []
    for start in range(0, len(cases), _BATCH):
        part = cases[start : start + _BATCH]
        output = pipeline(
            [case.text for case in part],
            width=trial.width,
            height=trial.height,
            num_inference_steps=trial.steps,
            guidance_scale=0.0,
            max_sequence_length=128,
            generator=[torch.Generator().manual_seed(case.seed) for case in part],
            output_type="np",
        )
        images += [(image * 255).round().astype(np.uint8) for image in output.images]
    return images


def true_renders(cases: Sequence[Case]) -> dict[str, str]:
    """Return the checker's figures on rendered images of the same cases, which it should read without errors."""
    renders = [render(case.composition, 128, 128, random.Random(case.seed)) for case in cases]
    return _shares([judge(case.composition, pixels) for case, pixels in zip(cases, renders, strict=True)], cases)


def evaluate_loras(folder: Path, loras: Path, grid: Path | None = None, count: int = 60) -> str:
    """Return a Markdown table of the share of images in each LoRA's style, without and with it.

    No caption names a style.
    """
    cases = [case for case in draw_cases(2 * count, held_out=False, seed=5) if case.composition.layout != "night"]
    cases = [case for case in cases if all(thing.colour != "black" for thing in case.composition.things)][:count]
    rows = ["| LoRA | images in its style without it | with it |", "|---|---|---|"]
    images = {"": generate_all(load(folder), cases, TRIALS[0])}
    for path in sorted(loras.glob("*.safetensors")):
        pipeline = load(folder)
        merge(pipeline.transformer, path)
        images[path.stem] = generate_all(pipeline, cases, TRIALS[0])
        style = path.stem.rpartition("-")[2]
        shares = [[style_of(pixels) for pixels in images[name]].count(style) / len(cases) for name in ("", path.stem)]
        rows.append(f"| {path.stem} | {100 * shares[0]:.0f} % | {100 * shares[1]:.0f} % |")
    if grid:
        sheet = np.concatenate([np.concatenate(row[:8], 1) for row in images.values()])
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
    """Draw a grid of images with their captions; the last four default captions are beyond the model."""
    cases = [Case(Composition("center"), text, 7 + i) for i, text in enumerate(texts)]
    images = generate_all(pipeline, cases, TRIALS[0])
    side, words = 128, 30
    rows = -(-len(texts) // columns)
    sheet = Image.new("RGB", (columns * (side + 12) + 12, rows * (side + words + 8) + 8), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for index, (case, pixels) in enumerate(zip(cases, images, strict=True)):
        x, y = 12 + index % columns * (side + 12), 8 + index // columns * (side + words + 8)
        sheet.paste(Image.fromarray(pixels), (x, y))
        pen.rectangle((x - 1, y - 1, x + side, y + side), outline=(200, 200, 200))
        pen.multiline_text((x, y + side + 3), _wrapped(case.text, 24), fill=(40, 40, 40), font_size=10, spacing=1)
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
"""Columns of the transformer's log to draw, with their colours."""


def draw_curves(log: Path, path: Path) -> None:
    """Draw the share of right images over the number of samples, from the transformer's CSV log."""
    rows = list(csv.DictReader(log.read_text().splitlines()))
    width, height, left, top = 720, 300, 60, 20
    sheet = Image.new("RGB", (width + left + 150, height + top + 50), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    most = max(float(row["samples"]) for row in rows)

    def point(row: dict[str, str], name: str) -> tuple[float, float]:
        return left + width * float(row["samples"]) / most, top + height * (1 - float(row[name]))

    for share in (0, 0.25, 0.5, 0.75, 1):
        y = top + height * (1 - share)
        pen.line((left, y, left + width, y), fill=(220, 220, 220))
        pen.text((left - 40, y - 6), f"{100 * share:.0f} %", fill=(60, 60, 60), font_size=11)
    for index, (name, colour) in enumerate(CURVES.items()):
        pen.line([point(row, name) for row in rows if row.get(name)], fill=colour, width=2)
        pen.text((left + width + 12, top + 20 * index), name.replace("_", " "), fill=colour, font_size=13)
    pen.text(
        (left, top + height + 12),
        f"samples seen, 0 to {most:.0f}; 16 to 48 captions per point, averaged weights",
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


def _shares(verdicts: Sequence[Verdict], cases: Sequence[Case]) -> dict[str, str]:
    right: dict[str, list[bool]] = defaultdict(list)
    for verdict, case in zip(verdicts, cases, strict=True):
        for kind, measure in MEASURES:
            value: bool | None = getattr(verdict, measure)
            if kind == case.composition.kind and value is not None:
                right[measure].append(value)
        right[f"all right, {case.composition.kind}"].append(verdict.all_right)
    return {
        name: f"{100 * sum(values) / len(values):.1f} % ({sum(values)}/{len(values)})" for name, values in right.items()
    }


def _table(figures: dict[str, dict[str, str]]) -> str:
    names = list(dict.fromkeys(name for column in figures.values() for name in column))
    head = f"| | {' | '.join(figures)} |\n|---|{'---|' * len(figures)}"
    rows = [f"| {name} | {' | '.join(column.get(name, '') for column in figures.values())} |" for name in names]
    return "\n".join((head, *rows))
