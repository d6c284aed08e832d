"""What the server uses of imaging carries no model."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "zcore.imaging",
        "zcore.imaging.geometry",
        "zcore.imaging.encode",
        "zcore.imaging.input_picture",
        "zcore.imaging.text.templates",
        "zcore.imaging.text.formatter",
        "zcore.imaging.text.token_count",
        "zcore.imaging.model.checkpoint",
    ],
)
def test_the_light_part_loads_no_torch(module: str) -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'numpy', 'huggingface_hub'}"
    program = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"
