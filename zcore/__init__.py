"""Shared library of the API server and the GPU workers, and the imaging library.

Imports neither `server` nor `worker`. Importing this package does not load torch; the first use of `ZImagePipeline` or
`PromptEncoder` does.

    from zcore import ZImagePipeline
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zcore.imaging.generation_inputs import Inputs
    from zcore.imaging.options import LoadOptions
    from zcore.imaging.pipeline import ZImagePipeline
    from zcore.imaging.progress import Progress
    from zcore.imaging.prompt_encoder import PromptEncoder
    from zcore.imaging.result import GenerationResult
    from zcore.imaging.text.embedding_file import PromptEmbedding
    from zcore.request import GenerationDefaults, GenerationRequest

__all__ = [
    "GenerationDefaults",
    "GenerationRequest",
    "GenerationResult",
    "Inputs",
    "LoadOptions",
    "Progress",
    "PromptEmbedding",
    "PromptEncoder",
    "ZImagePipeline",
]

_MODULES = {
    "GenerationDefaults": "zcore.request",
    "GenerationRequest": "zcore.request",
    "GenerationResult": "zcore.imaging.result",
    "Inputs": "zcore.imaging.generation_inputs",
    "LoadOptions": "zcore.imaging.options",
    "Progress": "zcore.imaging.progress",
    "PromptEmbedding": "zcore.imaging.text.embedding_file",
    "PromptEncoder": "zcore.imaging.prompt_encoder",
    "ZImagePipeline": "zcore.imaging.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first access (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
