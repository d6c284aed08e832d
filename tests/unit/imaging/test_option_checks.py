"""Load options from Python obey the bounds of the settings, before anything is read from the checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch

from zcore.errors import ConfigurationError
from zcore.imaging.options import OPTION_NAMES, EncoderOptions, LoadOptions
from zcore.imaging.pipeline import ZImagePipeline
from zcore.imaging.prompt_encoder import PromptEncoder

INVALID: dict[str, tuple[Any, str]] = {
    "encoder_device": ("gpu", "must be auto, cpu, mps, cuda or cuda:N"),
    "dit_device": (0, "must be auto, cpu, mps, cuda or cuda:N"),
    "vae_device": ("cuda:x", "must be auto, cpu, mps, cuda or cuda:N"),
    "encoder_dtype": (torch.float64, "must be one of bfloat16, float32, float16"),
    "torch_dtype": ("bf16", r"must be one of bfloat16, float32, float16; did you mean `bfloat16`\?"),
    "encoder_quantization": ("int4", "must be one of none, 8bit, fp8, 4bit"),
    "dit_quantization": ("int8", "must be one of none, 8bit, fp8, 4bit"),
    "encoder_weights": (4, r"must be a path, as a str or a pathlib\.Path"),
    "dit_weights": ("", r"must be a path, as a str or a pathlib\.Path"),
    "vae_weights": (b"file", r"must be a path, as a str or a pathlib\.Path"),
    "hidden_layer": (1, "must be a whole number from -36 to -1; the nearest is -1"),
    "templates_dir": (5, "must be a folder or a list of folders"),
    "embedding_cache_bytes": (-1, "must be a whole number of at least 0; the nearest is 0"),
    "tile_size": (100, "must be a whole number from 128 to 8192 that is a multiple of 16; the nearest is 128"),
    "tile_overlap": (3, "must be a whole number from 0 to 4096 that is a multiple of 8; the nearest is 0"),
    "cpu_offload": ("yes", "must be true or false"),
    "cpu_offload_unit": ("bogus", "must be one of network, block"),
    "batch_size": (0, "must be a whole number from 1 to 16; the nearest is 1"),
    "shift": (0, r"must be a number from 0\.1 to 20; the nearest is 0\.1"),
    "defaults": ({"steps": 8}, "must be a GenerationDefaults"),
    "compile": (1, "must be true or false"),
    "compile_mode": ("bogus", "must be one of default, reduce-overhead, max-autotune"),
    "attention_backend": ("flash", "must be one of auto, flash_attn_3"),
    "fused_loras": (["style.safetensors"], "must be a list of pairs|must be a pair of a LoRA file and its scale"),
}


def test_every_option_has_a_case() -> None:
    assert INVALID.keys() == set(OPTION_NAMES)


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_an_option_out_of_bounds_is_refused_by_name_before_the_checkpoint_is_read(name: str) -> None:
    value, complaint = INVALID[name]
    with pytest.raises(ConfigurationError, match=rf"^{name}(\.0)?: ({complaint})"):
        ZImagePipeline.from_pretrained("/no/such/checkpoint", **{name: value})


def test_all_invalid_options_are_reported_together() -> None:
    with pytest.raises(ConfigurationError, match=r"dit_quantization: .*; batch_size: "):
        LoadOptions.of({"dit_quantization": "int8", "batch_size": 0})


def test_a_scale_within_a_list_of_loras_is_named_by_its_place() -> None:
    with pytest.raises(
        ConfigurationError, match=r"fused_loras\.1\.1: must be a number from -10 to 10; the nearest is 10"
    ):
        LoadOptions.of({"fused_loras": [("one", 1), ("other", 20)]})


def test_values_made_without_keyword_conversion_are_checked_too() -> None:
    with pytest.raises(ConfigurationError, match="transformer_quantization: must be one of none, 8bit, fp8, 4bit"):
        LoadOptions(transformer_quantization="int8")
    with pytest.raises(ConfigurationError, match="quantization: must be one of none, 8bit, fp8, 4bit"):
        EncoderOptions(quantization="int8")


def test_an_encoder_refuses_by_its_own_names() -> None:
    with pytest.raises(ConfigurationError, match=r"^quantization: must be one of"):
        PromptEncoder.from_pretrained("/no/such/checkpoint", quantization="int8")


@pytest.mark.parametrize("path", [5, None, ""])
def test_a_model_path_of_another_kind_is_refused(path: Any) -> None:
    for load in (ZImagePipeline.from_pretrained, PromptEncoder.from_pretrained):
        with pytest.raises(ConfigurationError, match="model_path: must be a folder's path or a hub id"):
            load(path)


def test_values_may_have_any_accepted_type() -> None:
    options = LoadOptions.of(
        {
            "dit_device": torch.device("cuda", 1),
            "torch_dtype": "float32",
            "dit_weights": "weights.gguf",
            "templates_dir": ["one", Path("other")],
            "fused_loras": [["style.safetensors", 1]],
            "vae_weights": None,
        }
    )
    assert options.transformer_device == "cuda:1"
    assert options.torch_dtype == options.encoder.torch_dtype == torch.float32
    assert options.transformer_weights == Path("weights.gguf")
    assert options.encoder.templates_dir == (Path("one"), Path("other"))
    assert options.fused_loras == ((Path("style.safetensors"), 1),)
