"""The trainers: their forward equals the stock one, every stage trains, and a stopped training continues."""

import csv
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.numerics import ONE_FORWARD, assert_close_relative
from zcore.demo import train_transformer as transformer_stage
from zcore.demo.optimizers import Optimizers
from zcore.demo.train_lora import add_branches, diffusers_layout, export_loras, kohya_layout, train_lora
from zcore.demo.train_text_encoder import train_text_encoder
from zcore.demo.train_tokenizer import build_tokenizer
from zcore.demo.train_transformer import frame_of, fresh_transformer, predict, shifted, to_latents, to_patches
from zcore.demo.train_vae import train_vae
from zcore.demo.training_folder import TrainingFolder


@pytest.mark.parametrize(("width", "height", "length"), [(128, 128, 32), (96, 160, 64), (256, 256, 32)])
def test_the_trained_forward_equals_the_stock_one(width: int, height: int, length: int) -> None:
    torch.manual_seed(0)
    model = fresh_transformer()
    latents = torch.randn(2, 16, height // 8, width // 8)
    words, t = torch.randn(2, length, 128), torch.tensor([0.1, 0.6])
    real = torch.arange(length) < torch.tensor([[length - 5], [length - 9]])
    with torch.no_grad():
        frame = frame_of(width, height, length, "cpu")
        ours = to_latents(predict(model, to_patches(latents), t, words, real, frame), height // 8, width // 8)
        stock = model([one[:, None] for one in latents], t, [w[r] for w, r in zip(words, real, strict=True)]).sample
    assert_close_relative(ours, torch.stack([one[:, 0] for one in stock]), roundings=ONE_FORWARD)


def test_patches_convert_back_to_latents() -> None:
    latents = torch.randn(3, 16, 12, 20)
    assert (to_latents(to_patches(latents), 12, 20) == latents).all()


def test_eight_steps_follow_the_turbo_schedule() -> None:
    sigmas = [round(shifted(1 - i / 8), 4) for i in range(8)]
    assert sigmas == [1.0, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3]


def test_a_stopped_training_continues_from_its_state(tmp_path: Path) -> None:
    training = TrainingFolder(tmp_path)
    build_tokenizer(training.path("tokenizer"))
    train_text_encoder(training, steps=2, batch=4)
    before = training.load("text_encoder.pt")
    train_text_encoder(training, steps=2, batch=4)
    same = training.load("text_encoder.pt")
    train_text_encoder(training, steps=3, batch=4)
    after = training.load("text_encoder.pt")
    assert before
    assert same
    assert after
    assert (before["step"], same["step"], after["step"]) == (2, 2, 3)
    weight = "layers.0.self_attn.q_proj.weight"
    assert (before["model"][weight] == same["model"][weight]).all()
    assert (after["model"][weight] != same["model"][weight]).any()
    rows = list(csv.DictReader(training.path("text_encoder.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["2", "3"]


def test_both_lora_layouts_have_the_same_effect() -> None:
    model = fresh_transformer()
    branches = {name: (branch.down, torch.randn_like(branch.up)) for name, branch in add_branches(model).items()}
    plain, kohya = diffusers_layout(branches), kohya_layout(branches)
    assert len(branches) == 7 * (model.config.n_layers + model.config.n_refiner_layers)
    for name in branches:
        key = f"lora_unet_{name.replace('.', '_')}"
        down = kohya[f"{key}.lora_down.weight"]
        scale = float(kohya[f"{key}.alpha"]) / down.shape[0]
        expected = plain[f"transformer.{name}.lora_B.weight"] @ plain[f"transformer.{name}.lora_A.weight"]
        assert_close_relative(scale * kohya[f"{key}.lora_up.weight"] @ down, expected, roundings=4)


def test_every_stage_trains_a_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_stage, "_POOLS", dict.fromkeys(transformer_stage._POOLS, 20))
    training = TrainingFolder(tmp_path / "work")
    build_tokenizer(training.path("tokenizer"))
    train_vae(training, steps=2, pool=40, batch=4)
    train_text_encoder(training, steps=2, batch=4)
    transformer_stage.train_transformer(training, steps=2, batch=4)
    train_lora(training, steps=2, batch=4, pool=20)
    export_loras(training, tmp_path / "loras")
    for stage, rows in (("vae", 1), ("text_encoder", 1), ("transformer", 1), ("lora", 2)):
        log = list(csv.DictReader(training.path(f"{stage}.csv").read_text().splitlines()))
        assert [row["step"] for row in log] == ["2"] * rows
        assert all(float(row["loss"]) > 0 for row in log)
    assert len(list((tmp_path / "loras").glob("*.safetensors"))) == 2


def test_muon_moves_matrices_in_all_directions_alike_and_adamw_trains_the_rest() -> None:
    torch.manual_seed(0)
    matrix, vector = (torch.nn.Parameter(torch.zeros(size)) for size in ((8, 8), (8,)))
    optimizers = Optimizers([matrix], [vector], steps=100, muon_lr=0.1, adam_lr=0.01, warm_up=1)
    (matrix * torch.randn(8, 8)).sum().backward()
    (vector * torch.randn(8)).sum().backward()
    optimizers.step(0)
    singular_values = torch.linalg.svdvals(matrix.detach())
    assert 0.05 < singular_values.min() < singular_values.max() < 0.13
    torch.testing.assert_close(vector.detach().abs(), torch.full((8,), 0.01))


def test_the_learning_rate_rises_stays_and_falls() -> None:
    optimizers = Optimizers([], [torch.nn.Parameter(torch.zeros(1))], steps=100, muon_lr=0.1, adam_lr=0.1, warm_up=10)
    rates = [optimizers.rate(step) for step in range(100)]
    assert rates[9:50] == [1.0] * 41
    assert all(before < after for before, after in pairwise(rates[:10]))
    assert all(before >= after >= 0.05 for before, after in pairwise(rates[50:]))
