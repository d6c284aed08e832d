"""The stage `adopt` makes a training folder from the shipped model."""

import shutil
from pathlib import Path

import pytest
import torch

from zcore.demo import CHECKPOINT
from zcore.demo.adopt import adopt
from zcore.demo.stock import load
from zcore.demo.train_text_encoder import load_text_encoder
from zcore.demo.train_transformer import load_transformer
from zcore.demo.train_vae import load_vae
from zcore.demo.training_folder import TrainingFolder

LOGS = CHECKPOINT.parent / "training"


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> TrainingFolder:
    training = TrainingFolder(tmp_path_factory.mktemp("adopted") / "work")
    adopt(training, CHECKPOINT, LOGS)
    return training


def test_the_shipped_weights_become_the_states_of_the_training(training: TrainingFolder) -> None:
    pipeline = load(CHECKPOINT)
    for part, loaded in (
        (pipeline.transformer, load_transformer(training)),
        (pipeline.text_encoder, load_text_encoder(training)),
        (pipeline.vae, load_vae(training)),
    ):
        weights = loaded.state_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in part.state_dict().items())
    assert load_vae(training).config.scaling_factor == pytest.approx(pipeline.vae.config.scaling_factor, rel=1e-3)


def test_training_continues_after_the_end_of_its_log_with_fresh_optimizers(training: TrainingFolder) -> None:
    state = training.load("transformer.pt")
    assert state is not None
    last = (LOGS / "transformer.csv").read_text().splitlines()[-1].split(",")
    assert [state["step"], state["samples"]] == [int(last[1]), int(last[2])]
    assert state["optimizers"] is None
    assert (training.path("transformer.csv")).read_bytes() == (LOGS / "transformer.csv").read_bytes()


def test_an_existing_training_is_not_overwritten(training: TrainingFolder, tmp_path: Path) -> None:
    copy = shutil.copytree(training.folder, tmp_path / "work")
    with pytest.raises(FileExistsError, match="already contains a training"):
        adopt(TrainingFolder(copy), CHECKPOINT, LOGS)
