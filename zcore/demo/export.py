"""Stage `export`: write the trained parts as the folder to ship.

The folder has the layout of a `ZImagePipeline`, weights in bfloat16 and the class names of the real checkpoint, so
loaders need not know that it is a miniature.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline
from transformers import Qwen2Tokenizer

from zcore.demo.architecture import make_scheduler


def export(folder: Path, tokenizer: Path, text_encoder: Any, transformer: Any, vae: Any) -> None:
    """Write the five parts as one bfloat16 pipeline. `tokenizer` is the folder written by the stage `tokenizer`."""
    parts = {"text_encoder": text_encoder, "transformer": transformer, "vae": vae}
    reader: Any = Qwen2Tokenizer
    pipeline: Any = ZImagePipeline(
        scheduler=make_scheduler(),
        tokenizer=reader.from_pretrained(str(tokenizer)),
        **{name: part.to("cpu", torch.bfloat16) for name, part in parts.items()},
    )
    pipeline.save_pretrained(str(folder))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "tokenizer" / name).write_bytes((tokenizer / name).read_bytes())
    for name in ("chat_template.jinja", "special_tokens_map.json"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "Qwen2Tokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
