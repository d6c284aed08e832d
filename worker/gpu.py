"""From settings to loaded models on this process's devices: as much of the checkpoint as the worker's stages need.

Takes `Settings`; gives a `ZImagePipeline` or a `PromptEncoder`, or a `ConfigurationError` for a setting that this
version cannot honour, so that nothing is silently ignored. Does not know jobs.
"""

from typing import TYPE_CHECKING

from zcore.errors import ConfigurationError
from zcore.settings import Settings
from zcore.stages import Stage

if TYPE_CHECKING:
    from zcore.imaging.pipeline import ZImagePipeline
    from zcore.imaging.prompt_encoder import PromptEncoder
    from zcore.imaging.text.embedding_file import PromptEmbedding


def load_pipeline(settings: Settings) -> "ZImagePipeline":
    """The model in memory, ready to paint. Seconds for the demo checkpoint, a minute for the real one. Without its text
    encoder for a worker that serves `generate` alone.

    Raises `ConfigurationError` and `CheckpointError`.
    """
    _refuse_what_is_not_built(settings)
    from zcore.imaging.pipeline import ZImagePipeline

    if Stage.ENCODE not in settings.worker.stages:
        return ZImagePipeline.from_pretrained_generator_only(
            settings.model_location,
            torch_dtype=settings.pipeline.torch_dtype,
            dit_device=settings.pipeline.device,
            vae_device=settings.pipeline.device,
            attention_backend=settings.pytorch.attention_backend,
            compile=settings.pytorch.compile,
            compile_mode=settings.pytorch.compile_mode,
        )
    return ZImagePipeline.from_pretrained(
        settings.model_location,
        templates_dir=settings.templates_path,
        torch_dtype=settings.pipeline.torch_dtype,
        encoder_dtype=settings.encoder.torch_dtype,
        encoder_device=settings.encoder.device,
        dit_device=settings.pipeline.device,
        vae_device=settings.pipeline.device,
        hidden_layer=settings.encoder.hidden_layer,
        attention_backend=settings.pytorch.attention_backend,
        compile=settings.pytorch.compile,
        compile_mode=settings.pytorch.compile_mode,
        embedding_cache_bytes=settings.pytorch.embedding_cache_bytes if settings.pytorch.embedding_cache else 0,
    )


def load_encoder(settings: Settings) -> "PromptEncoder":
    """Tokenizer and text encoder alone, ready to encode.

    Raises `ConfigurationError` and `CheckpointError`.
    """
    _refuse_what_is_not_built(settings)
    from zcore.imaging.prompt_encoder import PromptEncoder
    from zcore.imaging.text.templates import TemplateLibrary

    return PromptEncoder.from_pretrained(
        settings.model_location,
        templates=TemplateLibrary.load(settings.templates_path),
        torch_dtype=settings.encoder.torch_dtype,
        device=settings.encoder.device,
        hidden_layer=settings.encoder.hidden_layer,
        embedding_cache_bytes=settings.pytorch.embedding_cache_bytes if settings.pytorch.embedding_cache else 0,
    )


def write_embedding(embedding: "PromptEmbedding") -> bytes:
    """An embedding as it is stored between two workers."""
    from zcore.imaging.text.embedding_file import to_bytes

    return to_bytes(embedding)


def read_embedding(content: bytes) -> "PromptEmbedding":
    """An embedding that another worker stored. Raises `InvalidRequest` of the field `embeddings`."""
    from zcore.imaging.text.embedding_file import from_bytes

    return from_bytes(content)


def _refuse_what_is_not_built(settings: Settings) -> None:
    wanted = {
        "encoder.quantization": settings.encoder.quantization != "none",
        "generation.guidance_scale": settings.generation.guidance_scale != 0.0,
        "pytorch.use_custom_scheduler": settings.pytorch.use_custom_scheduler,
        "pytorch.tiled_vae": settings.pytorch.tiled_vae,
        "dype.enabled": settings.dype.enabled,
        "slg.enabled": settings.slg.enabled,
        "lora.paths": bool(settings.lora.paths),
    }
    if not settings.jobs.split_encoding and set(settings.worker.stages) == {Stage.GENERATE}:
        raise ConfigurationError(
            "worker.stages: only `generate`, but jobs.split_encoding is off: nobody would encode the prompts"
        )
    for name, asked in wanted.items():
        if asked:
            raise ConfigurationError(
                f"{name}: is understood, but this version cannot honour it yet; leave it at its default"
            )
