"""Choices shared by settings, requests and the imaging library."""

from typing import Annotated, Literal

from msgspec import Meta

_DEVICES, _NAMES_OF_DEVICES = "auto|cpu|mps|cuda(:[0-9]+)?", "auto, cpu, mps, cuda or cuda:N"

Device = Annotated[str, Meta(pattern=rf"^({_DEVICES})$(?!\n)", description=_NAMES_OF_DEVICES)]
"""Where a network computes; `auto` is the best device of this machine."""

DeviceOrNone = Annotated[str, Meta(pattern=rf"^({_DEVICES}|)$(?!\n)", description=f"{_NAMES_OF_DEVICES}, or empty")]
"""A device, or nothing for that of another network."""

DTypeName = Literal["bfloat16", "float32", "float16"]
"""Floating-point types for computation, by their torch names."""

Quantization = Literal["none", "8bit", "fp8", "4bit"]
"""Formats in which a network's weights are stored; `none` keeps the configured dtype."""

AttentionBackend = Literal["auto", "flash_attn_3", "flash_attn_2", "sage", "xformers", "sdpa"]
"""Attention kernels; `auto` picks FlashAttention if it is installed and supports the device, else `sdpa`."""

OffloadUnit = Literal["network", "block"]
"""Unit that is moved to the device while it computes; all other weights stay in CPU memory."""

Offload = Literal["none", "network", "block"]
"""An `OffloadUnit`, or `none` to keep all weights on the device."""

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
"""Modes of `torch.compile`."""

BatchSize = Annotated[int, Meta(ge=1, le=16)]
"""Images of one request that are generated in one forward."""

CacheBytes = Annotated[int, Meta(ge=0)]
"""Memory that a cache may occupy; 0 turns it off."""

TileSize = Annotated[int, Meta(ge=128, le=8192, multiple_of=16)]
"""Side of a VAE tile, in pixels."""

TileOverlap = Annotated[int, Meta(ge=0, le=4096, multiple_of=8)]
"""Overlap of adjacent VAE tiles, in pixels; at most half a tile."""

TILE_SIZE_PX = 512
"""Default side of a VAE tile."""

TILE_OVERLAP_PX = 64
"""Default overlap of adjacent VAE tiles."""
