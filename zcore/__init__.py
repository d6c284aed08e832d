"""What the API server and the GPU workers agree on, and the imaging library itself.

Imports neither `server` nor `worker`. Importing this package loads nothing heavy: torch comes with the first use of
`ZImagePipeline` or `PromptEncoder`.

    from zcore import ZImagePipeline
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zcore.imaging.inputs import Inputs
    from zcore.imaging.pipeline import ZImagePipeline
    from zcore.imaging.prompt_encoder import PromptEncoder
    from zcore.imaging.text.embedding_file import PromptEmbedding

__all__ = ["Inputs", "PromptEmbedding", "PromptEncoder", "ZImagePipeline"]

_HOMES = {
    "Inputs": "zcore.imaging.inputs",
    "PromptEmbedding": "zcore.imaging.text.embedding_file",
    "PromptEncoder": "zcore.imaging.prompt_encoder",
    "ZImagePipeline": "zcore.imaging.pipeline",
}


def __getattr__(name: str) -> Any:
    """The public names, loaded when first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
