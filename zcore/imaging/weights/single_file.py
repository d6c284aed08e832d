"""A network's weights from one file: in the layouts of ComfyUI and of the checkpoint's authors, or GGUF.

Takes a file, the network wanted, and its configuration; returns the network's tensors under the names of diffusers and
transformers. A file may hold several networks, each under a prefix. The loader checks that the tensors are complete and
have the right shapes.

| network | prefixes | names in the file |
|---|---|---|
| transformer | `model.diffusion_model.`, `diffusion_model.`, none | ComfyUI's (fused `qkv`), or those of diffusers |
| text encoder | `text_encoders.qwen3_4b.transformer.model.`, `model.`, none | those of transformers or llama.cpp |
| VAE | `first_stage_model.`, `vae.`, none | those of latent diffusion (`decoder.up.0.block.0`), or those of diffusers |

Float8 weights are multiplied by their scale, if the file has one. GGUF is supported for the transformer and the text
encoder: quantized tensors stay diffusers' `GGUFParameter`s. A format may not keep the leading dimensions of size 1.

Sources of the layouts: ComfyUI's `split_files` of Z-Image, diffusers' `single_file_utils` (Apache-2.0), whose own
conversion is used for the VAE, and the tensor names of the `gguf` package for the architecture `qwen3`.
"""

import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import torch as safetensors_torch
from torch import Tensor

from zcore.checkpoint.files import GGUF_SUFFIX, Component
from zcore.errors import CheckpointError
from zcore.foreign_text import excerpt
from zcore.imaging.weights.gguf_header import check_metadata_ends
from zcore.imaging.weights.library_modules import library_module

_untyped: Any = safetensors_torch  # the type of `load_file` is incomplete

PREFIXES: dict[Component, tuple[str, ...]] = {
    "transformer": ("model.diffusion_model.", "diffusion_model."),
    "text_encoder": ("text_encoders.qwen3_4b.transformer.model.", "model."),
    "vae": ("first_stage_model.", "vae."),
}
"""Tried in this order; a file without any of them holds one network only."""

_RENAMED = (
    (re.compile(r"^x_embedder\."), "all_x_embedder.2-1."),
    (re.compile(r"^final_layer\."), "all_final_layer.2-1."),
    (re.compile(r"\.attention\.q_norm\."), ".attention.norm_q."),
    (re.compile(r"\.attention\.k_norm\."), ".attention.norm_k."),
    (re.compile(r"\.attention\.out\."), ".attention.to_out.0."),
)
_LLAMA_CPP = (
    (re.compile(r"^token_embd\."), "embed_tokens."),
    (re.compile(r"^output_norm\."), "norm."),
    (re.compile(r"^output\."), "lm_head."),
    (re.compile(r"^blk\."), "layers."),
    (re.compile(r"\.attn_(q|k|v)\."), r".self_attn.\1_proj."),
    (re.compile(r"\.attn_(q|k)_norm\."), r".self_attn.\1_norm."),
    (re.compile(r"\.attn_output\."), ".self_attn.o_proj."),
    (re.compile(r"\.attn_norm\."), ".input_layernorm."),
    (re.compile(r"\.ffn_(gate|up|down)\."), r".mlp.\1_proj."),
    (re.compile(r"\.ffn_norm\."), ".post_attention_layernorm."),
)
_FUSED = ".attention.qkv."
_UNUSED = ("norm_final.weight",)
"""Tensors that the published single files contain but no network uses."""

_SCALES = (".scale_weight", ".weight_scale")
_QUANTIZATION_MARKS = (".scale_input", ".input_scale", ".comfy_quant")
"""Tensors that accompany quantized weights; only the last one matters, as it names the format."""
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


class _ComfyFormat(msgspec.Struct):
    format: str = "none"


def read_single_file(
    path: Path, component: Component, config: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the network's tensors by its own names; scaled ones in `dtype`, the others in the file's dtypes.

    `dtype` is the one that the caller converts all of them to. Raises `CheckpointError` for an unsupported file.
    """
    if path.suffix == GGUF_SUFFIX:
        with _readable(path, "as GGUF"):
            return in_own_names(_read_gguf(path, component), component, config)
    content = read_weights([path], component)
    with _readable(path, "as safetensors"):
        return in_own_names(_unscaled(content, path, dtype), component, config)


def read_weights(paths: Sequence[Path], component: Component) -> dict[str, Tensor]:
    """Return the network's tensors in these safetensors files, without the prefix of the network, as they are.

    They are mapped from the files. Raises `CheckpointError` for a file that cannot be read.
    """
    content: dict[str, Tensor] = {}
    for path in paths:
        with _readable(path, "as safetensors"):
            content |= _untyped.load_file(path)
    return _without_prefix(content, component)


def in_own_names(content: dict[str, Tensor], component: Component, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the same tensors under the network's own names."""
    if component == "transformer":
        return _transformer_names(content)
    if component == "vae" and any(name.startswith("decoder.up.") for name in content):
        return library_module("diffusers.loaders.single_file_utils").convert_ldm_vae_checkpoint(content, config)
    if component == "text_encoder" and any(name.startswith("blk.") for name in content):
        return {_renamed(name, _LLAMA_CPP): tensor for name, tensor in content.items()}
    return content


@contextmanager
def _readable(path: Path, kind: str) -> Generator[None]:
    """Raise `CheckpointError` for any error: any byte of the file may be wrong, and its readers raise many kinds."""
    try:
        yield
    except (CheckpointError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read {kind}: {excerpt(error) or type(error).__name__}") from error


def _read_gguf(path: Path, component: Component) -> dict[str, Tensor]:
    if component == "vae":
        raise CheckpointError(f"{path}: GGUF is supported for the transformer and the text encoder, not for the VAE")
    check_metadata_ends(path)
    utilities = library_module("diffusers.models.model_loading_utils")
    return _without_prefix(utilities.load_gguf_checkpoint(str(path)), component)


def _without_prefix(content: Mapping[str, Tensor], component: Component) -> dict[str, Tensor]:
    """Return the tensors of one network of the file, without the prefix."""
    for prefix in PREFIXES[component]:
        found = {name.removeprefix(prefix): tensor for name, tensor in content.items() if name.startswith(prefix)}
        if found:
            return found
    return dict(content)


def _unscaled(content: dict[str, Tensor], path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Multiply float8 weights by their scales. Raises `CheckpointError` for any other quantization."""
    content.pop("scaled_fp8", None)
    for name in [name for name in content if name.endswith(_QUANTIZATION_MARKS)]:
        mark = content.pop(name)
        if name.endswith(".comfy_quant") and (kind := _comfy_format(mark)) not in _FLOAT8:
            raise CheckpointError(f"{path}: {name} specifies {kind}; of quantized weights only float8 is supported")
    for name in [name for name in content if name.endswith(_SCALES)]:
        weight = f"{name.rpartition('.')[0]}.weight"
        if weight not in content:
            raise CheckpointError(f"{path}: {name} is a scale without its weight")
        numbers, scale = content[weight].float(), content.pop(name).float().flatten()
        if scale.numel() not in (1, numbers.shape[0]):
            raise CheckpointError(f"{path}: {name} must be one scale, or one for each row of {weight}")
        content[weight] = (numbers * scale.view(-1, *(1 for _ in numbers.shape[1:]))).to(dtype)
    return content


def _comfy_format(mark: Tensor) -> str:
    """Decode ComfyUI's name of a weight's format: JSON in a tensor of bytes."""
    try:
        return msgspec.json.decode(mark.to(torch.uint8).numpy().tobytes(), type=_ComfyFormat).format
    except msgspec.DecodeError:
        return "an unreadable format"


def _transformer_names(content: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in content.items():
        if name in _UNUSED:
            continue
        renamed = _renamed(name, _RENAMED)
        if _FUSED in renamed:
            parts = zip("qkv", tensor.chunk(3), strict=True)  # whole rows, so quantized ones stay intact
            found |= {renamed.replace(_FUSED, f".attention.to_{letter}."): part for letter, part in parts}
        else:
            found[renamed] = tensor
    return found


def _renamed(name: str, rules: Sequence[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name)
    return name
