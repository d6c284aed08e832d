"""The two shipped LoRAs: small, each in its own key layout, and each changes a style that the prompt does not name."""

from pathlib import Path

import pytest
from safetensors import safe_open

from zcore.demo import CHECKPOINT
from zcore.demo.check import style_of
from zcore.demo.evaluate import Ask, Trial, load, paint_all
from zcore.demo.lora import merge
from zcore.demo.vocabulary import Picture

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
def test_each_changes_the_style_without_a_word_about_it(style: str) -> None:
    asks = [Ask(Picture("center"), text, seed) for seed, text in enumerate(TEXTS)]
    pipeline = load(CHECKPOINT)
    plain = [style_of(pixels) for pixels in paint_all(pipeline, asks, Trial("plain"))]
    merge(pipeline.transformer, Path(LORAS / f"demo-{style}.safetensors"))
    styled = [style_of(pixels) for pixels in paint_all(pipeline, asks, Trial(style))]
    assert style not in plain
    assert styled.count(style) >= 3
