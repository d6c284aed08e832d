"""The unmodified pipeline of diffusers on an exported folder: what the demo model is measured by.

Takes a folder; gives diffusers' `ZImagePipeline` (Apache-2.0). Knows nothing of our own engine.
"""

import warnings
from pathlib import Path
from typing import Any

import torch


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The unmodified stock pipeline."""
    from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline

    stock: Any = ZImagePipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = stock.from_pretrained(str(folder), dtype=dtype, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
