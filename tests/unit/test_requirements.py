"""Everything that a machine lacks for its settings is said at once, with the way out, before torch is imported."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from zcore.checkpoint import requirements
from zcore.cli.model_files import check_gpu
from zcore.errors import ConfigurationError
from zcore.settings import TREE, Settings, load_settings


def always(value: Any) -> Callable[[str], Any]:
    """Return a function that returns `value` for any name."""
    return lambda _name: value


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU driver."""
    monkeypatch.setattr(shutil, "which", always(None))
    monkeypatch.setattr(requirements, "DRIVER_PATHS", ())


def settings(**environment: str) -> Settings:
    return load_settings({"HF_HUB_OFFLINE": "1", **environment})


@pytest.mark.usefixtures("no_gpu")
def test_model_and_gpu_are_named_together_with_the_download() -> None:
    model, gpu = requirements.missing(settings(ZIMAGE_PROFILE="rtx4090", ZIMAGE_MODEL_PATH="/models/Z-Image-Turbo"))
    assert model == (
        "model_path: /models/Z-Image-Turbo is not a folder; download the model (33 GB): "
        "`.venv/bin/hf download Tongyi-MAI/Z-Image-Turbo --local-dir /models/Z-Image-Turbo`"
    )
    assert gpu == "encoder.device, pipeline.device: cuda is configured, but this machine has no GPU driver"


def test_a_model_that_is_not_downloaded_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(requirements, "locate_local", always(None))
    (found,) = requirements.missing(settings())
    assert found == (
        "model_path: Tongyi-MAI/Z-Image-Turbo is not on this machine; download it: "
        "`.venv/bin/hf download Tongyi-MAI/Z-Image-Turbo` (33 GB)"
    )


@pytest.mark.parametrize("folder", ["./model", "../Z-Image-Turbo", "models/"])
def test_a_relative_folder_is_not_taken_for_a_model_to_download(folder: str) -> None:
    found = requirements.missing(settings(ZIMAGE_PROFILE="demo", ZIMAGE_MODEL_PATH=folder))
    assert found[0].startswith(f"model_path: {folder} is not a folder; download the model")
    assert found[0].endswith(f"`.venv/bin/hf download Tongyi-MAI/Z-Image-Turbo --local-dir {folder}`")


@pytest.mark.usefixtures("no_gpu")
def test_the_demo_needs_neither() -> None:
    assert requirements.missing(settings(ZIMAGE_PROFILE="demo")) == []


def test_a_driver_does_not_help_a_torch_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", always("/usr/bin/nvidia-smi"))
    demo_on_cuda = settings(ZIMAGE_PROFILE="demo", ZIMAGE_PIPELINE__DEVICE="cuda:1")
    monkeypatch.setattr(metadata, "version", always("2.13.0+cpu"))
    (found,) = requirements.missing(demo_on_cuda)
    assert found == "pipeline.device: cuda is configured, but torch 2.13.0+cpu is built for CPUs only"
    monkeypatch.setattr(metadata, "version", always("2.13.0"))
    assert requirements.missing(demo_on_cuda) == []


def test_make_run_says_it_before_it_starts_anything(tmp_path: Path) -> None:
    environment = {
        "PATH": "/nowhere",
        "PYTHONPATH": str(TREE),
        "ZIMAGE_PROFILE": "rtx4090",
        "ZIMAGE_MODEL_PATH": "/no/such/model",
        "ZIMAGE_DATA_DIR": str(tmp_path / "data"),
    }
    failed = subprocess.run([sys.executable, "bin/run.py"], cwd=TREE, env=environment, capture_output=True, text=True)
    assert failed.returncode == 1
    assert "model_path: /no/such/model is not a folder" in failed.stderr
    assert "zimage doctor --profile rtx4090" in failed.stderr
    assert "the profile `demo`" in failed.stderr
    assert not (tmp_path / "data").exists()


@pytest.mark.usefixtures("no_gpu")
def test_the_command_line_names_all_that_is_missing_and_the_ways_out() -> None:
    chosen = settings(ZIMAGE_PROFILE="rtx4090", ZIMAGE_MODEL_PATH="/models/Z-Image-Turbo")
    with pytest.raises(ConfigurationError) as refused:
        check_gpu(chosen, ["transformer"])
    for expected in [*requirements.missing(chosen), "zimage doctor --profile rtx4090", "the profile `demo`"]:
        assert expected in str(refused.value)


@pytest.mark.usefixtures("no_gpu")
def test_only_the_components_that_a_command_loads_need_the_gpu() -> None:
    chosen = settings(ZIMAGE_PROFILE="rtx4090", ZIMAGE_ENCODER__DEVICE="cpu")
    assert requirements.missing_gpu(chosen, ["text_encoder"]) is None
    assert requirements.missing_gpu(chosen, ["transformer"]) is not None
