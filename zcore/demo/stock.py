"""The unmodified diffusers pipeline, the reference that the demo model is measured with.

Loads diffusers' `ZImagePipeline` (Apache-2.0). Independent of our own engine.
"""

import warnings
from pathlib import Path
from typing import Any

import torch


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load an exported folder with the unmodified pipeline."""
    from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline

    stock: Any = ZImagePipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = stock.from_pretrained(str(folder), dtype=dtype, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
