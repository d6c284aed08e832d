"""Settings reach the pipeline."""

from pathlib import Path

import pytest
import torch

from zcore.imaging.from_settings import load_encoder, load_generator, load_pipeline
from zcore.imaging.model import loader
from zcore.settings import load_settings


def test_settings_decide_where_and_how_a_pipeline_computes(tiny_folder: Path) -> None:
    chosen = {"encoder.torch_dtype": "float32", "pipeline.torch_dtype": "bfloat16", "pytorch.attention_backend": "sdpa"}
    devices = {"encoder.device": "cpu", "pipeline.device": "cpu", "pipeline.vae_device": "cpu"}
    settings = load_settings({}, {"model_path": str(tiny_folder), **chosen, **devices})
    described = load_pipeline(settings).describe()
    assert (described["encoder_dtype"], described["transformer_dtype"]) == ("float32", "bfloat16")
    assert described["attention_backend"] == "sdpa"
    assert "encoder_dtype" not in load_generator(settings).describe()
    assert load_encoder(settings).describe()["encoder_dtype"] == "float32"


def test_settings_decide_in_how_many_bits_weights_are(tiny_folder: Path) -> None:
    chosen = {"encoder.quantization": "4bit", "pipeline.quantization": "8bit"}
    devices = {"encoder.device": "cpu", "pipeline.device": "cpu"}
    settings = load_settings({}, {"model_path": str(tiny_folder), **chosen, **devices})
    plain = load_settings({}, {"model_path": str(tiny_folder), **devices})
    described = load_pipeline(settings).describe()
    assert (described["encoder_quantization"], described["transformer_quantization"]) == ("4bit", "8bit")
    few, all_bits = load_encoder(settings).encode("a fox").embeds, load_encoder(plain).encode("a fox").embeds
    error = float((few.float() - all_bits.float()).norm() / all_bits.float().norm())
    assert 0.001 < error < 0.2


def test_an_encoder_alone_rests_too_where_weights_shall(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "device_of", lambda _name: torch.device("meta"))
    chosen = {"model_path": str(tiny_folder), "pytorch.cpu_offload": "true", "pytorch.cpu_offload_unit": "network"}
    encoder = load_encoder(load_settings({}, chosen))
    assert encoder._model._network._present is None
    assert load_encoder(load_settings({}, {"model_path": str(tiny_folder)}))._model._network._present is not None
