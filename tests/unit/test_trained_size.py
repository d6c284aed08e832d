"""Sizes follow from what the checkpoint's own configuration says it was trained at."""

import json
from pathlib import Path
from typing import Any

import pytest

from zcore.checkpoint.trained_size import resolutions, size_notice, trained_side, trained_side_here
from zcore.errors import CheckpointError
from zcore.request import parse_generation
from zcore.settings import TREE
from zcore.sizes import TRAINED

DEMO = TREE / "zcore" / "demo" / "checkpoint"


def checkpoint(folder: Path, vae: dict[str, Any]) -> Path:
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps(vae))
    return folder


def test_the_resolutions_of_the_published_model_are_those_of_its_table() -> None:
    assert resolutions(1024) == list(TRAINED)
    assert resolutions(256) == [256, 320, 384]


def test_a_checkpoint_states_its_size(tmp_path: Path) -> None:
    assert trained_side(DEMO) == trained_side_here(str(DEMO)) == 256
    assert trained_side(checkpoint(tmp_path, {"sample_size": 768})) == 768


@pytest.mark.parametrize("vae", [{}, {"sample_size": "large"}, {"sample_size": 0}])
def test_a_checkpoint_without_a_size_is_refused_by_file(tmp_path: Path, vae: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"vae/config\.json: sample_size must be a whole number from 1"):
        trained_side(checkpoint(tmp_path, vae))


def test_a_checkpoint_that_is_elsewhere_counts_as_the_published_one(tmp_path: Path) -> None:
    assert trained_side_here(str(tmp_path)) == trained_side_here("/no/such/checkpoint") == 1024


@pytest.mark.parametrize(
    ("side_px", "fields", "has_notice"),
    [
        (256, {"width": 384, "height": 384}, False),
        (256, {"width": 512, "height": 288}, False),
        (256, {"width": 400, "height": 384}, True),
        (1024, {"width": 2048, "height": 1152}, False),
        (1024, {"width": 2048, "height": 2048}, True),
        (1024, {"width": 2048, "height": 2048, "dype": {}}, False),
        (1024, {"width": 2048, "height": 2048, "passes": [{"scale": 0.5}, {"scale": 1.0}]}, False),
    ],
)
def test_a_size_far_above_the_trained_one_is_noted(side_px: int, fields: dict[str, Any], has_notice: bool) -> None:
    notice = size_notice(parse_generation({"prompt": "a", **fields}), side_px)
    assert (notice is not None) == has_notice
    if notice:
        assert f"{fields['width']}x{fields['height']} is far above {side_px}x{side_px}" in notice
