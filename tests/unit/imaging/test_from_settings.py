"""Settings decide how a pipeline is loaded and what its calls default to."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from zcore.checkpoint.defaults import generation_defaults
from zcore.imaging.from_settings import load_encoder, load_generator, load_pipeline
from zcore.imaging.options import LoadOptions
from zcore.imaging.pipeline import ZImagePipeline
from zcore.imaging.prompt_encoder import PromptEncoder
from zcore.imaging.weights import loader
from zcore.request import RequestLimits, parse_submission
from zcore.settings import load_settings

ON_CPU = {"encoder.device": "cpu", "pipeline.device": "cpu", "pipeline.vae_device": "cpu"} | {
    "encoder.torch_dtype": "float32",
    "pipeline.torch_dtype": "float32",
}
DEVICES = {"encoder_device": "cpu", "dit_device": "cpu", "vae_device": "cpu", "torch_dtype": "float32"}


def test_settings_decide_where_and_how_a_pipeline_computes(tiny_folder: Path) -> None:
    chosen = {"encoder.torch_dtype": "float32", "pipeline.torch_dtype": "bfloat16", "pytorch.attention_backend": "sdpa"}
    devices = {"encoder.device": "cpu", "pipeline.device": "cpu", "pipeline.vae_device": "cpu"}
    settings = load_settings({}, {"model_path": str(tiny_folder), **chosen, **devices})
    described = load_pipeline(settings).describe()
    assert (described["encoder_dtype"], described["transformer_dtype"]) == ("float32", "bfloat16")
    assert described["attention_backend"] == "sdpa"
    assert "encoder_dtype" not in load_generator(settings).describe()
    assert load_encoder(settings).describe()["encoder_dtype"] == "float32"


def test_settings_decide_the_quantization(tiny_folder: Path) -> None:
    chosen = {"encoder.quantization": "4bit", "pipeline.quantization": "8bit"}
    devices = {"encoder.device": "cpu", "pipeline.device": "cpu"}
    settings = load_settings({}, {"model_path": str(tiny_folder), **chosen, **devices})
    plain = load_settings({}, {"model_path": str(tiny_folder), **devices})
    described = load_pipeline(settings).describe()
    assert (described["encoder_quantization"], described["transformer_quantization"]) == ("4bit", "8bit")
    few, all_bits = load_encoder(settings).encode("a fox").embeds, load_encoder(plain).encode("a fox").embeds
    error = float((few.float() - all_bits.float()).norm() / all_bits.float().norm())
    assert 0.001 < error < 0.2


def test_an_offloaded_encoder_alone_stays_in_the_cpus_memory(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "device_of", lambda _name: torch.device("meta"))
    chosen = {"model_path": str(tiny_folder), "pytorch.cpu_offload": "true", "pytorch.cpu_offload_unit": "network"}
    encoder = load_encoder(load_settings({}, chosen))
    assert encoder._model._network._present is None
    assert load_encoder(load_settings({}, {"model_path": str(tiny_folder)}))._model._network._present is not None


@pytest.fixture
def shifted_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint whose scheduler states a shift of 6.0."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "shifted"))
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "shift": 6.0}))
    return folder


def test_every_way_in_takes_the_shift_of_the_checkpoint(shifted_folder: Path) -> None:
    """The service and the command line took 3.0 from the settings, the Python API 6.0 from the checkpoint."""
    settings = load_settings({}, {"model_path": str(shifted_folder), **ON_CPU})
    request = parse_submission({"prompt": "a fox"}, generation_defaults(settings), RequestLimits()).request
    assert request.shift == 6.0
    called, asked = ZImagePipeline.from_pretrained(shifted_folder, **DEVICES), load_pipeline(settings)
    small: dict[str, Any] = {"width": 64, "height": 64, "seed": 1}
    expected = called("a fox", shift=6.0, **small).tobytes()
    assert called("a fox", **small).tobytes() == expected
    assert asked("a fox", **small).tobytes() == expected
    assert called("a fox", shift=3.0, **small).tobytes() != expected


def test_a_shift_in_the_settings_overrides_that_of_the_checkpoint(shifted_folder: Path) -> None:
    settings = load_settings({}, {"model_path": str(shifted_folder), "scheduler.shift": "2.0", **ON_CPU})
    small: dict[str, Any] = {"width": 64, "height": 64, "seed": 1}
    pipeline = load_pipeline(settings)
    assert generation_defaults(settings).shift == 2.0
    assert pipeline("a fox", **small).tobytes() == pipeline("a fox", shift=2.0, **small).tobytes()
    assert pipeline("a fox", **small).tobytes() != pipeline("a fox", shift=6.0, **small).tobytes()


def test_a_pipeline_from_settings_defaults_to_the_operators_size_and_steps(tiny_folder: Path) -> None:
    chosen = {"generation.width": "64", "generation.height": "96", "generation.num_inference_steps": "1"}
    pipeline = load_pipeline(load_settings({}, {"model_path": str(tiny_folder), **chosen, **ON_CPU}))
    assert pipeline("a fox", seed=1).size == (64, 96)
    assert pipeline("a fox", seed=1).tobytes() == pipeline("a fox", seed=1, num_inference_steps=1).tobytes()


def test_an_unknown_option_is_refused_with_the_nearest_one(tiny_folder: Path) -> None:
    with pytest.raises(TypeError, match=r"there is no option `tile_sizes`; did you mean `tile_size`\?"):
        ZImagePipeline.from_pretrained(tiny_folder, tile_sizes=256)
    with pytest.raises(TypeError, match="there is no option `dit_device`"):
        PromptEncoder.from_pretrained(tiny_folder, dit_device="cpu")


def test_the_pipelines_dtype_is_the_encoders_unless_it_has_its_own(tiny_folder: Path) -> None:
    options = LoadOptions.of({"torch_dtype": "float32"})
    assert options.encoder.torch_dtype == options.torch_dtype == torch.float32
    assert LoadOptions.of({"torch_dtype": "float32", "encoder_dtype": "bfloat16"}).encoder.torch_dtype == torch.bfloat16
