"""The trainers: their forward is the stock one, and they go on where they stopped."""

import csv
from pathlib import Path

import pytest
import torch

from zcore.demo.lora import add_branches, diffusers_layout, kohya_layout
from zcore.demo.text_encoder import train_text_encoder
from zcore.demo.tokenizer import build_tokenizer
from zcore.demo.transformer import frame_of, fresh_transformer, paint, shifted, to_latents, to_patches
from zcore.demo.workplace import Workplace


@pytest.mark.parametrize(("width", "height", "length"), [(128, 128, 32), (96, 160, 64), (256, 256, 32)])
def test_the_trained_forward_equals_the_stock_one(width: int, height: int, length: int) -> None:
    torch.manual_seed(0)
    model = fresh_transformer()
    latents = torch.randn(2, 16, height // 8, width // 8)
    words, t = torch.randn(2, length, 128), torch.tensor([0.1, 0.6])
    real = torch.arange(length) < torch.tensor([[length - 5], [length - 9]])
    with torch.no_grad():
        frame = frame_of(width, height, length, "cpu")
        ours = to_latents(paint(model, to_patches(latents), t, words, real, frame), height // 8, width // 8)
        stock = model([one[:, None] for one in latents], t, [w[r] for w, r in zip(words, real, strict=True)]).sample
    torch.testing.assert_close(ours, torch.stack([one[:, 0] for one in stock]), atol=1e-5, rtol=0)


def test_patches_and_latents_are_each_others_inverse() -> None:
    latents = torch.randn(3, 16, 12, 20)
    assert (to_latents(to_patches(latents), 12, 20) == latents).all()


def test_eight_steps_are_those_of_the_turbo_schedule() -> None:
    sigmas = [round(shifted(1 - i / 8), 4) for i in range(8)]
    assert sigmas == [1.0, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3]


def test_a_stopped_training_goes_on_from_its_state(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    build_tokenizer(place.path("tokenizer"))
    train_text_encoder(place, steps=2, batch=4)
    before = place.load("text_encoder.pt")
    train_text_encoder(place, steps=2, batch=4)
    same = place.load("text_encoder.pt")
    train_text_encoder(place, steps=3, batch=4)
    after = place.load("text_encoder.pt")
    assert before
    assert same
    assert after
    assert (before["step"], same["step"], after["step"]) == (2, 2, 3)
    weight = "layers.0.self_attn.q_proj.weight"
    assert (before["model"][weight] == same["model"][weight]).all()
    assert (after["model"][weight] != same["model"][weight]).any()
    rows = list(csv.DictReader(place.path("text_encoder.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["2", "3"]


def test_both_lora_layouts_say_the_same() -> None:
    model = fresh_transformer()
    branches = {name: (branch.down, torch.randn_like(branch.up)) for name, branch in add_branches(model).items()}
    plain, kohya = diffusers_layout(branches), kohya_layout(branches)
    assert len(branches) == 7 * (model.config.n_layers + model.config.n_refiner_layers)
    for name in branches:
        key = f"lora_unet_{name.replace('.', '_')}"
        down = kohya[f"{key}.lora_down.weight"]
        scale = float(kohya[f"{key}.alpha"]) / down.shape[0]
        wanted = plain[f"transformer.{name}.lora_B.weight"] @ plain[f"transformer.{name}.lora_A.weight"]
        torch.testing.assert_close(scale * kohya[f"{key}.lora_up.weight"] @ down, wanted, atol=0.05, rtol=0.02)
