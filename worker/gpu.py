"""From settings to a loaded pipeline on this process's device.

Takes `Settings`; gives a `ZImagePipeline`, or a `ConfigurationError` for a setting that this version cannot honour, so
that nothing is silently ignored. Does not know jobs.
"""

from typing import TYPE_CHECKING

from zcore.errors import ConfigurationError
from zcore.settings import Settings

if TYPE_CHECKING:
    from zcore.imaging.pipeline import ZImagePipeline


def load_pipeline(settings: Settings) -> "ZImagePipeline":
    """The model in memory, ready to paint. Seconds for the demo checkpoint, a minute for the real one.

    Raises `ConfigurationError` and `CheckpointError`.
    """
    _refuse_what_is_not_built(settings)
    from zcore.imaging.pipeline import ZImagePipeline

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
        tile_size=settings.pytorch.tile_size,
        tile_overlap=settings.pytorch.tile_overlap,
        embedding_cache_bytes=settings.pytorch.embedding_cache_bytes if settings.pytorch.embedding_cache else 0,
    )


def _refuse_what_is_not_built(settings: Settings) -> None:
    wanted = {
        "encoder.quantization": settings.encoder.quantization != "none",
        "generation.guidance_scale": settings.generation.guidance_scale != 0.0,
        "pytorch.use_custom_scheduler": settings.pytorch.use_custom_scheduler,
        "dype.enabled": settings.dype.enabled,
        "slg.enabled": settings.slg.enabled,
        "lora.paths": bool(settings.lora.paths),
    }
    for name, asked in wanted.items():
        if asked:
            raise ConfigurationError(
                f"{name}: is understood, but this version cannot honour it yet; leave it at its default"
            )
