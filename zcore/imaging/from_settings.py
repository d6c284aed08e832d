"""From the operator's settings to a loaded model on this process's devices.

Takes `Settings`; gives a whole pipeline, or one of its halves. Loads torch with the first call. Does not know jobs or
command lines.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zcore.imaging.model.checkpoint import GGUF_SUFFIX
from zcore.settings import Settings

if TYPE_CHECKING:
    import torch

    from zcore.imaging.model.checkpoint import Component
    from zcore.imaging.model.loader import Offload
    from zcore.imaging.model.memory import Part
    from zcore.imaging.pipeline import ZImagePipeline
    from zcore.imaging.prompt_encoder import PromptEncoder


def load_pipeline(settings: Settings) -> "ZImagePipeline":
    """The model in memory, ready to paint. Seconds for the demo checkpoint, a minute for the real one.

    Raises `ConfigurationError`, `CheckpointError`, and `InvalidLora` for a file in `lora.paths`.
    """
    from zcore.imaging.pipeline import ZImagePipeline

    return ZImagePipeline.from_pretrained(
        settings.model_location,
        templates_dir=settings.templates_paths,
        encoder_dtype=settings.encoder.torch_dtype,
        encoder_device=settings.encoder.device,
        encoder_quantization=settings.encoder.quantization,
        encoder_weights=settings.encoder_weights,
        embedding_cache_bytes=_cache_bytes(settings),
        **_painting(settings),
    )


def load_generator(settings: Settings) -> "ZImagePipeline":
    """Transformer and VAE alone, to paint from an embedding. Raises as `load_pipeline` does."""
    from zcore.imaging.pipeline import ZImagePipeline

    return ZImagePipeline.from_pretrained_generator_only(settings.model_location, **_painting(settings))


def load_encoder(settings: Settings) -> "PromptEncoder":
    """Tokenizer and text encoder alone, to make embeddings. Raises as `load_pipeline` does."""
    from zcore.imaging.prompt_encoder import PromptEncoder
    from zcore.imaging.text.templates import TemplateLibrary

    return PromptEncoder.from_pretrained(
        settings.model_location,
        templates=TemplateLibrary.load(*settings.templates_paths),
        torch_dtype=settings.encoder.torch_dtype,
        device=settings.encoder.device,
        quantization=settings.encoder.quantization,
        offload=_offload(settings),
        weights=settings.encoder_weights,
        hidden_layer=settings.encoder.hidden_layer,
        embedding_cache_bytes=_cache_bytes(settings),
    )


def memory_parts(
    settings: Settings, folder: Path, device_of: "Callable[[str], torch.device] | None" = None
) -> "dict[Component, Part]":
    """How the settings load each network, as `memory.estimate` takes it. `folder` is the checkpoint's.

    `device_of` says which device a setting means, where that is not `loader.device_of`'s to say. Raises
    `CheckpointError`.
    """
    from zcore.imaging.model import loader
    from zcore.imaging.model.memory import Part

    find = device_of or loader.device_of
    dtype = loader.dtype_of(settings.pipeline.torch_dtype)
    encoder = loader.text_encoder_placement(
        find(settings.encoder.device),
        loader.dtype_of(settings.encoder.torch_dtype),
        settings.encoder.quantization,
        _offload(settings),
    )
    transformer = loader.transformer_placement(
        find(settings.pipeline.device),
        dtype,
        settings.pipeline.quantization,
        _offload(settings),
    )
    vae = loader.vae_placement(folder, find(settings.pipeline.vae_device or settings.pipeline.device), dtype)
    return {
        "text_encoder": Part(encoder),
        "transformer": Part(transformer, _packed_file_bytes(settings.dit_weights)),
        "vae": Part(vae),
    }


def _offload(settings: Settings) -> "Offload":
    return settings.pytorch.cpu_offload_unit if settings.pytorch.cpu_offload else "none"


def _packed_file_bytes(file: Path | None) -> int | None:
    """Of GGUF, which stays packed; other files, and one that is not there, count in the arithmetic of the settings."""
    return file.stat().st_size if file is not None and file.suffix == GGUF_SUFFIX and file.is_file() else None


def _painting(settings: Settings) -> dict[str, Any]:
    """What transformer and VAE are loaded with."""
    return {
        "torch_dtype": settings.pipeline.torch_dtype,
        "dit_device": settings.pipeline.device,
        "vae_device": settings.pipeline.vae_device or settings.pipeline.device,
        "dit_quantization": settings.pipeline.quantization,
        "dit_weights": settings.dit_weights,
        "vae_weights": settings.vae_weights,
        "cpu_offload": settings.pytorch.cpu_offload,
        "cpu_offload_unit": settings.pytorch.cpu_offload_unit,
        "batch_size": settings.pytorch.batch_size,
        "hidden_layer": settings.encoder.hidden_layer,
        "attention_backend": settings.pytorch.attention_backend,
        "compile": settings.pytorch.compile,
        "compile_mode": settings.pytorch.compile_mode,
        "fused_loras": settings.fused_loras,
        "tile_size": settings.pytorch.tile_size,
        "tile_overlap": settings.pytorch.tile_overlap,
    }


def _cache_bytes(settings: Settings) -> int:
    return settings.pytorch.embedding_cache_bytes if settings.pytorch.embedding_cache else 0
