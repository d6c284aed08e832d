"""From the operator's settings to a loaded model on this process's devices.

Importing this module loads torch. Does not depend on jobs or command lines.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from zcore.checkpoint.defaults import generation_defaults
from zcore.checkpoint.files import GGUF_SUFFIX, Component
from zcore.choices import Offload
from zcore.imaging.memory_estimate import Part
from zcore.imaging.network.tiling import Tiling
from zcore.imaging.options import EncoderOptions, LoadOptions
from zcore.imaging.pipeline import ZImagePipeline
from zcore.imaging.prompt_encoder import PromptEncoder
from zcore.imaging.weights import loader
from zcore.settings import Settings


def load_pipeline(settings: Settings) -> ZImagePipeline:
    """Load the whole model: seconds for the demo checkpoint, a minute for the published one.

    Raises `ConfigurationError`, `CheckpointError`, and `InvalidLora` for a file in `lora.paths`.
    """
    return ZImagePipeline.load(settings.model_location, load_options(settings))


def load_generator(settings: Settings) -> ZImagePipeline:
    """Load transformer and VAE only, to generate from embeddings. Raises as `load_pipeline` does."""
    return ZImagePipeline.load(settings.model_location, load_options(settings), with_encoder=False)


def load_encoder(settings: Settings) -> PromptEncoder:
    """Load tokenizer and text encoder only, to make embeddings. Raises as `load_pipeline` does."""
    return PromptEncoder.load(settings.model_location, encoder_options(settings))


def load_options(settings: Settings) -> LoadOptions:
    """Return how these settings load a checkpoint. Raises `ConfigurationError` and `CheckpointError`."""
    return LoadOptions(
        encoder=encoder_options(settings),
        transformer_device=settings.pipeline.device,
        vae_device=settings.pipeline.vae_device or settings.pipeline.device,
        torch_dtype=loader.dtype_of(settings.pipeline.torch_dtype),
        transformer_quantization=settings.pipeline.quantization,
        transformer_weights=settings.dit_weights,
        vae_weights=settings.vae_weights,
        offload=_offload(settings),
        batch_size=settings.pytorch.batch_size,
        defaults=generation_defaults(settings),
        compile=settings.pytorch.compile,
        compile_mode=settings.pytorch.compile_mode,
        attention_backend=settings.pytorch.attention_backend,
        tiling=Tiling(settings.pytorch.tile_size, settings.pytorch.tile_overlap),
        fused_loras=tuple(settings.fused_loras),
    )


def encoder_options(settings: Settings) -> EncoderOptions:
    """Return how these settings load a text encoder."""
    return EncoderOptions(
        device=settings.encoder.device,
        torch_dtype=loader.dtype_of(settings.encoder.torch_dtype),
        quantization=settings.encoder.quantization,
        offload=_offload(settings),
        weights=settings.encoder_weights,
        hidden_layer=settings.encoder.hidden_layer,
        templates_dir=settings.templates_paths,
        embedding_cache_bytes=settings.pytorch.embedding_cache_bytes if settings.pytorch.embedding_cache else 0,
    )


def memory_parts(
    settings: Settings, folder: Path, device_of: Callable[[str], torch.device] | None = None
) -> dict[Component, Part]:
    """Return how the settings load each network, as `memory_estimate.estimate` takes it.

    `folder` is the checkpoint's; `device_of` replaces `loader.device_of`, to simulate another machine. Raises
    `CheckpointError`.
    """
    options = load_options(settings)
    return {
        "text_encoder": Part(options.encoder.placement(device_of), _packed_file_bytes(settings.encoder_weights)),
        "transformer": Part(options.transformer_placement(device_of), _packed_file_bytes(settings.dit_weights)),
        "vae": Part(options.vae_placement(folder, device_of)),
    }


def _offload(settings: Settings) -> Offload:
    return settings.pytorch.cpu_offload_unit if settings.pytorch.cpu_offload else "none"


def _packed_file_bytes(file: Path | None) -> int | None:
    """Return the size of a GGUF file, which stays packed; None for others and for one that does not exist."""
    return file.stat().st_size if file is not None and file.suffix == GGUF_SUFFIX and file.is_file() else None
