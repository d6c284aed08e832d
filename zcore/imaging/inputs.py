"""What a generation starts from beside its request. Needs no torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from zcore.imaging.text.embedding_file import PromptEmbedding


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a request names by address, at hand: the picture it starts from, the mask over it, its prompt's embedding.

    Pictures may have any mode and size; they are fitted by the request's `fit`. A mask is white where to paint anew.
    """

    image: Image.Image | None = None
    mask: Image.Image | None = None
    embedding: "PromptEmbedding | None" = None
