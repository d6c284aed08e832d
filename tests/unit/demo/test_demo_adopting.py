"""Who has only the shipped model can train on from it."""

import shutil
from pathlib import Path

import pytest
import torch

from zcore.demo import CHECKPOINT
from zcore.demo.adopt import adopt
from zcore.demo.stock import load
from zcore.demo.text_encoder import load_text_encoder
from zcore.demo.transformer import load_transformer
from zcore.demo.vae import load_vae
from zcore.demo.workplace import Workplace

LOGS = CHECKPOINT.parent / "training"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("adopted") / "work")
    adopt(place, CHECKPOINT, LOGS)
    return place


def test_the_shipped_weights_are_the_states_of_the_training(place: Workplace) -> None:
    pipeline = load(CHECKPOINT)
    for part, loaded in (
        (pipeline.transformer, load_transformer(place)),
        (pipeline.text_encoder, load_text_encoder(place)),
        (pipeline.vae, load_vae(place)),
    ):
        weights = loaded.state_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in part.state_dict().items())
    assert load_vae(place).config.scaling_factor == pytest.approx(pipeline.vae.config.scaling_factor, rel=1e-3)


def test_training_goes_on_where_its_log_ends_with_fresh_optimizers(place: Workplace) -> None:
    state = place.load("transformer.pt")
    assert state is not None
    last = (LOGS / "transformer.csv").read_text().splitlines()[-1].split(",")
    assert [state["step"], state["samples"]] == [int(last[1]), int(last[2])]
    assert state["optimizers"] is None
    assert (place.path("transformer.csv")).read_bytes() == (LOGS / "transformer.csv").read_bytes()


def test_a_training_that_is_there_is_not_overwritten(place: Workplace, tmp_path: Path) -> None:
    kept = shutil.copytree(place.folder, tmp_path / "work")
    with pytest.raises(FileExistsError, match="holds a training already"):
        adopt(Workplace(kept), CHECKPOINT, LOGS)
