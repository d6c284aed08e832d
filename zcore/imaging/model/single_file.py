"""A network's weights out of one file, as ComfyUI and the checkpoint's authors lay it out, or as GGUF.

Takes a file, which network is wanted, and that network's configuration; gives its tensors by the names of diffusers and
transformers. A file may hold several networks, each behind a prefix. Which weights a network has to have, and of which
shape, is the loader's to say.

| network | prefixes | its names |
|---|---|---|
| transformer | `model.diffusion_model.`, `diffusion_model.`, none | ComfyUI's (fused `qkv`), or those of diffusers |
| text encoder | `text_encoders.qwen3_4b.transformer.model.`, `model.`, none | those of transformers |
| VAE | `first_stage_model.`, `vae.`, none | those of latent diffusion (`decoder.up.0.block.0`), or those of diffusers |

Weights in float8 are multiplied by the scale beside them, if there is one. GGUF, of the transformer alone: tensors in
blocks of few bits stay `GGUFParameter`s of diffusers.

Sources of the layouts: ComfyUI's `split_files` of Z-Image and diffusers' `single_file_utils` (Apache-2.0), whose own
conversion is used for the VAE.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from zcore.errors import CheckpointError
from zcore.imaging.model.checkpoint import GGUF_SUFFIX, Component
from zcore.imaging.model.quantization import quiet_imports

PREFIXES: dict[Component, tuple[str, ...]] = {
    "transformer": ("model.diffusion_model.", "diffusion_model."),
    "text_encoder": ("text_encoders.qwen3_4b.transformer.model.", "model."),
    "vae": ("first_stage_model.", "vae."),
}
"""Looked for in this order; a file without any holds one network alone."""

_RENAMED = (
    (re.compile(r"^x_embedder\."), "all_x_embedder.2-1."),
    (re.compile(r"^final_layer\."), "all_final_layer.2-1."),
    (re.compile(r"\.attention\.q_norm\."), ".attention.norm_q."),
    (re.compile(r"\.attention\.k_norm\."), ".attention.norm_k."),
    (re.compile(r"\.attention\.out\."), ".attention.to_out.0."),
)
_FUSED = ".attention.qkv."
_UNUSED = ("norm_final.weight",)
"""In the published single files, and in no network."""

_SCALES = (".scale_weight", ".weight_scale")
_MARKS = (".scale_input", ".input_scale", ".comfy_quant")
"""Beside packed weights; of these only the last decides anything: which kind it is."""
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


class _Kind(msgspec.Struct):
    format: str = "none"


def read_single_file(
    path: Path, component: Component, config: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The network's tensors by its names; scaled ones in `dtype`, which all will be cast to, others as they are.

    Raises `CheckpointError` for a file that is not understood.
    """
    if path.suffix == GGUF_SUFFIX:
        return in_own_names(_read_gguf(path, component), component, config)
    try:
        content = cast(dict[str, Tensor], cast(Any, safetensors_torch).load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return in_own_names(_unscaled(_unprefixed(content, component), path, dtype), component, config)


def in_own_names(content: dict[str, Tensor], component: Component, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same tensors by the network's own names."""
    if component == "transformer":
        return _of_transformer(content)
    if component == "vae" and any(name.startswith("decoder.up.") for name in content):
        with quiet_imports():
            from diffusers.loaders import single_file_utils
        return cast(Any, single_file_utils).convert_ldm_vae_checkpoint(content, config)
    return content


def _read_gguf(path: Path, component: Component) -> dict[str, Tensor]:
    if component != "transformer":
        raise CheckpointError(f"{path}: GGUF is read for the transformer alone, not for the {component}")
    with quiet_imports():
        from diffusers.models import model_loading_utils
    try:
        return _unprefixed(cast(Any, model_loading_utils).load_gguf_checkpoint(str(path)), component)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read as GGUF: {str(error).strip().splitlines()[0]}") from error


def _unprefixed(content: Mapping[str, Tensor], component: Component) -> dict[str, Tensor]:
    """The tensors of one network among all."""
    for prefix in PREFIXES[component]:
        found = {name.removeprefix(prefix): one for name, one in content.items() if name.startswith(prefix)}
        if found:
            return found
    return dict(content)


def _unscaled(content: dict[str, Tensor], path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Float8 weights with their scales as plain numbers. Raises `CheckpointError` for weights packed otherwise."""
    content.pop("scaled_fp8", None)
    for name in [name for name in content if name.endswith(_MARKS)]:
        mark = content.pop(name)
        if name.endswith(".comfy_quant") and (kind := _kind_said(mark)) not in _FLOAT8:
            raise CheckpointError(f"{path}: {name} says {kind}; of packed weights only float8 is read")
    for name in [name for name in content if name.endswith(_SCALES)]:
        weight = f"{name.rpartition('.')[0]}.weight"
        if weight not in content:
            raise CheckpointError(f"{path}: {name} is the scale of no weight")
        numbers, scale = content[weight].float(), content.pop(name).float().flatten()
        if scale.numel() not in (1, numbers.shape[0]):
            raise CheckpointError(f"{path}: {name} is neither one scale nor one for each row of {weight}")
        content[weight] = (numbers * scale.view(-1, *(1 for _ in numbers.shape[1:]))).to(dtype)
    return content


def _kind_said(mark: Tensor) -> str:
    """What ComfyUI says of a weight beside it, as JSON in a tensor of bytes."""
    try:
        return msgspec.json.decode(mark.to(torch.uint8).numpy().tobytes(), type=_Kind).format
    except msgspec.DecodeError:
        return "nothing that can be read"


def _of_transformer(content: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in content.items():
        if name in _UNUSED:
            continue
        renamed = name
        for pattern, replacement in _RENAMED:
            renamed = pattern.sub(replacement, renamed)
        if _FUSED in renamed:
            parts = zip("qkv", tensor.chunk(3), strict=True)  # rows; packed ones stay whole
            found |= {renamed.replace(_FUSED, f".attention.to_{letter}."): part for letter, part in parts}
        else:
            found[renamed] = tensor
    return found
