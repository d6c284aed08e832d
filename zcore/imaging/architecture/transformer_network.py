"""The diffusion transformer's network: its layers with their weights; `forward` has the arithmetic between them.

Names of weights and configuration, and each layer's arithmetic, are those of diffusers' `ZImageTransformer2DModel`
(Apache-2.0); tests compare both bit for bit. It is defined here because importing that class takes longer than
importing torch: it brings every other model of the library, and every quantization library that is installed.
"""

import math
from typing import cast

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional

from zcore.imaging.architecture.rms_norm import RMSNorm

MODULATION_WIDTH = 256
"""Width of the vector from which blocks compute their factors."""

TIME_HIDDEN_WIDTH = 1024
TIME_FREQUENCIES = 128
LONGEST_PERIOD = 10000.0
QUERY_NORM_EPS = 1e-5


class TransformerConfig(msgspec.Struct, frozen=True):
    """The part of `transformer/config.json` that the network depends on. Other values are refused."""

    in_channels: int
    dim: int
    n_layers: int
    n_refiner_layers: int
    n_heads: int
    cap_feat_dim: int
    axes_dims: tuple[int, ...]
    axes_lens: tuple[int, int, int]
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    norm_eps: float = 1e-5
    all_patch_size: tuple[int, ...] = (2,)
    all_f_patch_size: tuple[int, ...] = (1,)
    siglip_feat_dim: None = None

    @property
    def modulation_width(self) -> int:
        """Width of the vector from which blocks compute their factors: 256, or less in a narrower network."""
        return min(self.dim, MODULATION_WIDTH)


class TransformerNetwork(nn.Module):
    """Embedders, refiners, main blocks and final layers."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.t_scale = config.t_scale
        patches = zip(config.all_patch_size, config.all_f_patch_size, strict=True)
        sizes = {f"{side}-{frames}": side * side * frames * config.in_channels for side, frames in patches}
        self.all_x_embedder = nn.ModuleDict({name: nn.Linear(size, config.dim) for name, size in sizes.items()})
        self.all_final_layer = nn.ModuleDict({name: FinalLayer(config, size) for name, size in sizes.items()})
        refiners = range(config.n_refiner_layers)
        self.noise_refiner = nn.ModuleList(TransformerBlock(config) for _ in refiners)
        self.context_refiner = nn.ModuleList(TransformerBlock(config, is_modulated=False) for _ in refiners)
        self.t_embedder = TimeEmbedder(config)
        self.cap_embedder = nn.Sequential(
            RMSNorm(config.cap_feat_dim, config.norm_eps), nn.Linear(config.cap_feat_dim, config.dim)
        )
        self.x_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))


class TransformerBlock(nn.Module):
    """The layers of one block. Blocks that refine the caption are not modulated."""

    def __init__(self, config: TransformerConfig, is_modulated: bool = True) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config.dim)
        self.attention_norm1 = RMSNorm(config.dim, config.norm_eps)
        self.attention_norm2 = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm1 = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm2 = RMSNorm(config.dim, config.norm_eps)
        if is_modulated:
            self.adaLN_modulation = nn.Sequential(nn.Linear(config.modulation_width, 4 * config.dim))


class Attention(nn.Module):
    """The layers around attention; the kernel itself is a parameter of `forward`."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.n_heads
        self.to_q = nn.Linear(config.dim, config.dim, bias=False)
        self.to_k = nn.Linear(config.dim, config.dim, bias=False)
        self.to_v = nn.Linear(config.dim, config.dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(config.dim, config.dim, bias=False)])
        self.norm_q = RMSNorm(config.dim // config.n_heads, QUERY_NORM_EPS)
        self.norm_k = RMSNorm(config.dim // config.n_heads, QUERY_NORM_EPS)


class FeedForward(nn.Module):
    """SwiGLU: Shazeer 2020 (arXiv 2002.05202), equation 6."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden_width = int(width / 3 * 8)
        self.w1 = nn.Linear(width, hidden_width, bias=False)
        self.w2 = nn.Linear(hidden_width, width, bias=False)
        self.w3 = nn.Linear(width, hidden_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        gate, value = self.w1(x), self.w3(x)  # four tensors of this width at the peak, as `memory_estimate` counts
        return self.w2(functional.silu(gate) * value)


class FinalLayer(nn.Module):
    """The layers from the last hidden state to one patch of `out_features` values per token."""

    def __init__(self, config: TransformerConfig, out_features: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(config.dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(config.dim, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.modulation_width, config.dim))


class TimeEmbedder(nn.Module):
    """Map times (B,) to vectors (B, modulation width): sines and cosines, then two linear layers."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        first = nn.Linear(2 * TIME_FREQUENCIES, TIME_HIDDEN_WIDTH)
        self.mlp = nn.Sequential(first, nn.SiLU(), nn.Linear(TIME_HIDDEN_WIDTH, config.modulation_width))

    def forward(self, t: Tensor) -> Tensor:
        """Embed float32 times, already multiplied by `t_scale`."""
        order = torch.arange(TIME_FREQUENCIES, dtype=torch.float32, device=t.device)
        angles = t[:, None] * torch.exp(-math.log(LONGEST_PERIOD) * order / TIME_FREQUENCIES)[None]
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1)
        return self.mlp(waves.to(cast(nn.Linear, self.mlp[0]).weight.dtype))
