"""Defaults of a request: explicit values, else the operator's settings, else the checkpoint's, else the published."""

import json
from pathlib import Path

import pytest

from zcore.checkpoint.defaults import default_shift, generation_defaults
from zcore.errors import CheckpointError
from zcore.request import parse_generation, parse_submission
from zcore.settings import Settings, load_settings

CHECKPOINT_SHIFT = 6.0


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Folder of a checkpoint whose schedule has another shift than the published model."""
    return write_shift(tmp_path / "checkpoint", CHECKPOINT_SHIFT)


def write_shift(folder: Path, shift: object) -> Path:
    (folder / "scheduler").mkdir(parents=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"shift": shift}))
    return folder


def settings_of(checkpoint: Path, **overrides: object) -> Settings:
    """Load settings as the service and the command line do."""
    return load_settings({"ZIMAGE_MODEL_PATH": str(checkpoint)}, overrides)


def test_the_checkpoints_shift_applies_if_the_setting_is_unset(checkpoint: Path) -> None:
    settings = settings_of(checkpoint)
    defaults = generation_defaults(settings)
    submitted = parse_submission({"prompt": "a fox"}, defaults, settings.limits).request
    assert submitted.shift == parse_generation({"prompt": "a fox"}, defaults).shift == CHECKPOINT_SHIFT


def test_the_setting_overrides_the_checkpoint(checkpoint: Path) -> None:
    defaults = generation_defaults(settings_of(checkpoint, **{"scheduler.shift": 4.5}))
    assert parse_generation({"prompt": "a fox"}, defaults).shift == 4.5


def test_an_explicit_value_overrides_checkpoint_and_setting(checkpoint: Path) -> None:
    for overrides in ({}, {"scheduler.shift": 4.5}):
        defaults = generation_defaults(settings_of(checkpoint, **overrides))
        assert parse_generation({"prompt": "a fox", "shift": 3.0}, defaults).shift == 3.0


def test_the_published_shift_applies_without_a_local_checkpoint(tmp_path: Path) -> None:
    assert generation_defaults(settings_of(tmp_path / "missing")).shift == 3.0


@pytest.mark.parametrize("shift", [None, "6", True, 0, 21])
def test_an_invalid_shift_of_a_checkpoint_is_refused_with_its_file(tmp_path: Path, shift: object) -> None:
    folder = write_shift(tmp_path / "checkpoint", shift)
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json: shift must be a number from 0\.1 to 20"):
        default_shift(folder)
