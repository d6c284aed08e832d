"""Loads the parts of the checkpoint that this worker's stages need, and converts embeddings to and from bytes.

Importing this module loads torch.
"""

from zcore.errors import ConfigurationError
from zcore.imaging import from_settings
from zcore.imaging.pipeline import ZImagePipeline
from zcore.imaging.prompt_encoder import PromptEncoder
from zcore.imaging.text.embedding_file import PromptEmbedding, from_bytes, to_bytes
from zcore.settings import Settings
from zcore.stages import Stage


def load_pipeline(settings: Settings) -> ZImagePipeline:
    """Return the loaded model, without its text encoder if the worker serves only `generate`.

    Raises `ConfigurationError` and `CheckpointError`.
    """
    if Stage.ENCODE in settings.worker.stages:
        return from_settings.load_pipeline(settings)
    if not settings.jobs.split_encoding:
        raise ConfigurationError(
            "worker.stages: contains only `generate`, but jobs.split_encoding is off, so no worker would encode "
            "the prompts; add `encode` or set jobs.split_encoding=true"
        )
    return from_settings.load_generator(settings)


def load_encoder(settings: Settings) -> PromptEncoder:
    """Return the loaded tokenizer and text encoder. Raises as `load_pipeline` does."""
    return from_settings.load_encoder(settings)


def write_embedding(embedding: PromptEmbedding) -> bytes:
    """Return an embedding as the bytes that are stored between two workers."""
    return to_bytes(embedding)


def read_embedding(content: bytes) -> PromptEmbedding:
    """Return an embedding that another worker stored. Raises `InvalidEmbedding` for the field `embeddings`."""
    return from_bytes(content)
