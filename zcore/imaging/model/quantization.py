"""Weights in fewer bits: which kinds there are, and how a linear layer gets them.

Takes a layer with plain weights; leaves it with weights that are unpacked as it computes, in the arithmetic it had
before. Nothing else of a network is changed: norms, embeddings and biases stay as they are. Does not know files and
devices.

| kind | a weight | what packs it |
|---|---|---|
| `8bit` | int8, a float32 scale for each row | torchao |
| `fp8` | float8 e4m3, a float32 scale for each row | torchao |
| `4bit` | NF4, a float32 scale for each 64 | bitsandbytes |

NF4: Dettmers et al., QLoRA, 2023 (arXiv 2305.14314), section 3.
"""

from typing import Literal

Quantization = Literal["none", "8bit", "fp8", "4bit"]
