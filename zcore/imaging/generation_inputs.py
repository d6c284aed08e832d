"""What a generation starts from besides its request. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

    from zcore.imaging.lora.adapters import LoraWeights
    from zcore.imaging.text.embedding_file import PromptEmbedding


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a request refers to, in memory: the image it starts from, a mask, its prompt's embedding, its LoRAs.

    Images may have any mode and size; they are resized as the request's `fit` says. A mask is white where the image is
    to be generated. `latents` (n, 16, h, w) are the initial noise of the first pass, instead of the seed's, at an
    eighth of its size; they cannot be combined with an image. `loras` maps the names in the request to results of
    `ZImagePipeline.load_lora`; others are ignored.
    """

    image: Image.Image | None = None
    mask: Image.Image | None = None
    embedding: "PromptEmbedding | None" = None
    latents: "Tensor | None" = None
    loras: "Mapping[str, LoraWeights]" = field(default_factory=dict[str, "LoraWeights"])
