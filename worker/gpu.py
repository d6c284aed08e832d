"""As much of the checkpoint as this worker's stages need, loaded, and embeddings on their way between two workers.

Takes `Settings`; gives a `ZImagePipeline` or a `PromptEncoder`. Does not know jobs.
"""

from typing import TYPE_CHECKING

from zcore.errors import ConfigurationError
from zcore.imaging import from_settings
from zcore.settings import Settings
from zcore.stages import Stage

if TYPE_CHECKING:
    from zcore.imaging.pipeline import ZImagePipeline
    from zcore.imaging.text.embedding_file import PromptEmbedding


def load_pipeline(settings: Settings) -> "ZImagePipeline":
    """The model in memory, ready to paint; without its text encoder for a worker that serves `generate` alone.

    Raises `ConfigurationError` and `CheckpointError`.
    """
    if Stage.ENCODE in settings.worker.stages:
        return from_settings.load_pipeline(settings)
    if not settings.jobs.split_encoding:
        raise ConfigurationError(
            "worker.stages: only `generate`, but jobs.split_encoding is off: nobody would encode the prompts"
        )
    return from_settings.load_generator(settings)


def write_embedding(embedding: "PromptEmbedding") -> bytes:
    """An embedding as it is stored between two workers."""
    from zcore.imaging.text.embedding_file import to_bytes

    return to_bytes(embedding)


def read_embedding(content: bytes) -> "PromptEmbedding":
    """An embedding that another worker stored. Raises `InvalidRequest` of the field `embeddings`."""
    from zcore.imaging.text.embedding_file import from_bytes

    return from_bytes(content)
