"""The demo model: a trained miniature of Z-Image, and everything that makes and checks it.

`checkpoint/` holds the trained model in the layout of a `ZImagePipeline`; any stock diffusers loads it. The stages
that made it have one file each, named by it: `render`, `tokenizer`, `vae`, `text_encoder`, `transformer`, `lora`,
`export`, `evaluate` (`python -m zcore.demo <stage>`). Serving needs nothing of this code, only the folder
`CHECKPOINT`.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The shipped model: a folder that `ZImagePipeline.from_pretrained` loads as it is."""
