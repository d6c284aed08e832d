"""The two shipped LoRAs are small, have different key layouts, and change the style without a trigger word."""

from pathlib import Path

import pytest
from safetensors import safe_open

from zcore.demo import CHECKPOINT
from zcore.demo.check import style_of
from zcore.demo.evaluate import Case, Trial, generate_all, load
from zcore.demo.train_lora import merge
from zcore.demo.vocabulary import Composition

LORAS = CHECKPOINT.parent / "loras"
TEXTS = ("a red circle", "a large green square on a beige background", "two blue stars", "a yellow heart on the left")


@pytest.mark.parametrize(
    ("style", "ending"),
    [("outline", "lora_A.weight lora_B.weight"), ("night", "lora_down.weight lora_up.weight alpha")],
)
def test_each_is_small_and_has_its_own_key_layout(style: str, ending: str) -> None:
    path = LORAS / f"demo-{style}.safetensors"
    assert path.stat().st_size <= 1_000_000
    with safe_open(path, "pt") as stored:
        keys = list(stored.keys())
    assert all(key.endswith(tuple(ending.split())) for key in keys)
    assert all(key.startswith("transformer." if style == "outline" else "lora_unet_") for key in keys)


@pytest.mark.parametrize("style", ["outline", "night"])
def test_each_changes_the_style_without_a_trigger_word(style: str) -> None:
    cases = [Case(Composition("center"), text, seed) for seed, text in enumerate(TEXTS)]
    pipeline = load(CHECKPOINT)
    plain = [style_of(pixels) for pixels in generate_all(pipeline, cases, Trial("plain"))]
    merge(pipeline.transformer, Path(LORAS / f"demo-{style}.safetensors"))
    styled = [style_of(pixels) for pixels in generate_all(pipeline, cases, Trial(style))]
    assert style not in plain
    assert styled.count(style) >= 3
