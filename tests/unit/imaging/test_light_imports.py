"""The modules that the server uses import no model code."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "zcore.imaging",
        "zcore.checkpoint.geometry",
        "zcore.image_files.writing",
        "zcore.image_files.configured_marks",
        "zcore.image_files.input_images",
        "zcore.prompt.templates",
        "zcore.prompt.formatter",
        "zcore.prompt.token_count",
        "zcore.checkpoint.files",
        "zcore.checkpoint.layer_counts",
        "zcore.checkpoint.scheduler",
        "zcore.safetensors_header",
    ],
)
def test_the_light_part_loads_no_heavy_library(module: str) -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'numpy', 'huggingface_hub', 'c2pa', 'cryptography'}"
    program = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"
