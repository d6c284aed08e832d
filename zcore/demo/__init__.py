"""Demo model: a trained miniature of Z-Image, with everything needed to train, export and evaluate it.

`checkpoint/` holds the trained model in the layout of a `ZImagePipeline`, which the unmodified diffusers loads.
`python -m zcore.demo STAGE` runs the stages of the training. Serving needs only the folder `CHECKPOINT`, none of this
code.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The shipped model: a folder that `ZImagePipeline.from_pretrained` loads unchanged."""
