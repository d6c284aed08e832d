"""Settings that this version cannot honour are refused by name; all others reach the pipeline."""

from pathlib import Path
from typing import Any

import pytest

from zcore.errors import ConfigurationError
from zcore.imaging.from_settings import load_encoder, load_generator, load_pipeline, refuse_what_is_not_built
from zcore.settings import load_settings

NOT_BUILT = {"encoder.quantization": "8bit", "pytorch.cpu_offload": "true"}


@pytest.mark.parametrize("name", NOT_BUILT)
@pytest.mark.parametrize("load", [load_pipeline, load_generator, load_encoder])
def test_what_is_not_built_is_refused_by_its_name(name: str, load: Any) -> None:
    settings = load_settings({}, {name: NOT_BUILT[name]})
    with pytest.raises(ConfigurationError, match=rf"^{name}: is understood, but this version cannot honour it yet"):
        load(settings)
    with pytest.raises(ConfigurationError, match=r"^--flag: is understood"):
        refuse_what_is_not_built(settings, {name: "--flag"})


def test_the_shipped_profiles_ask_for_nothing_that_is_not_built() -> None:
    for profile in ("default", "demo", "rtx4090", "rtx4080", "production"):
        refuse_what_is_not_built(load_settings({"ZIMAGE_PROFILE": profile}))


def test_settings_decide_where_and_how_a_pipeline_computes(tiny_folder: Path) -> None:
    chosen = {"encoder.torch_dtype": "float32", "pipeline.torch_dtype": "bfloat16", "pytorch.attention_backend": "sdpa"}
    devices = {"encoder.device": "cpu", "pipeline.device": "cpu", "pipeline.vae_device": "cpu"}
    settings = load_settings({}, {"model_path": str(tiny_folder), **chosen, **devices})
    described = load_pipeline(settings).describe()
    assert (described["encoder_dtype"], described["transformer_dtype"]) == ("float32", "bfloat16")
    assert described["attention_backend"] == "sdpa"
    assert "encoder_dtype" not in load_generator(settings).describe()
    assert load_encoder(settings).describe()["encoder_dtype"] == "float32"
