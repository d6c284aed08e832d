"""What a generation starts from beside its request. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from zcore.imaging.model.lora import LoraWeights
    from zcore.imaging.text.embedding_file import PromptEmbedding


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a request names, at hand: the picture it starts from, the mask over it, its prompt's embedding, its LoRAs.

    Pictures may have any mode and size; they are fitted by the request's `fit`. A mask is white where to paint anew.
    LoRAs are what `ZImagePipeline.load_lora` gave, by the names that the request uses; there may be others.
    """

    image: Image.Image | None = None
    mask: Image.Image | None = None
    embedding: "PromptEmbedding | None" = None
    loras: "Mapping[str, LoraWeights]" = field(default_factory=dict[str, "LoraWeights"])
