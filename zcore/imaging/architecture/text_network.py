"""The text encoder's network: Qwen3 without its output head.

Equals, bit for bit, transformers' `Qwen3Model` (Apache-2.0), with its names of weights and configuration; tests compare
both. It is defined here because importing that class takes as long as importing torch once more: it brings torch's
compiler, and every quantization library that is installed. Qwen3 technical report: arXiv 2505.09388, section 2.
"""

from typing import Literal, NamedTuple

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional

from zcore.imaging.architecture.rms_norm import RMSNorm

DEFAULT_ROPE_THETA = 10000.0


class _RopeParameters(msgspec.Struct, frozen=True):
    rope_theta: float = DEFAULT_ROPE_THETA
    rope_type: Literal["default"] = "default"


class TextNetworkConfig(msgspec.Struct, frozen=True):
    """The part of `text_encoder/config.json` that the network depends on. Other values are refused."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    hidden_act: Literal["silu"] = "silu"
    use_sliding_window: bool = False
    rope_scaling: None = None
    rope_theta: float | None = None
    rope_parameters: _RopeParameters = _RopeParameters()

    def __post_init__(self) -> None:
        if self.use_sliding_window:
            raise ValueError("use_sliding_window must be false")

    @property
    def rotary_base(self) -> float:
        """Base of the rotary frequencies; transformers 5 writes it below `rope_parameters`."""
        return self.rope_parameters.rope_theta if self.rope_theta is None else self.rope_theta


class RotaryTables(NamedTuple):
    """Cosines and sines (1, L, head_dim) by position, in the dtype of the network."""

    cos: Tensor
    sin: Tensor


class TextNetwork(nn.Module):
    """Embedding, blocks and final norm. Callers run as many blocks as they need."""

    def __init__(self, config: TextNetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TextBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class TextBlock(nn.Module):
    """Attention and feed forward, each normalized before and added to its input."""

    def __init__(self, config: TextNetworkConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = _FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, rotary: RotaryTables, mask: Tensor | None) -> Tensor:
        """Map (B, L, hidden) to (B, L, hidden). `mask` is the result of `causal_mask`."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotary, mask)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


def rotary_tables(config: TextNetworkConfig, length: int, like: Tensor) -> RotaryTables:
    """Return the tables for positions 0 to `length` - 1, on the device and in the dtype of `like`.

    Su et al. 2021 (arXiv 2104.09864), with the halves of a head as pairs. Computed in float32.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = (1.0 / config.rotary_base**exponents).to(like.device)
    angles = torch.arange(length, device=like.device)[None, :, None].float() * frequencies  # (1, L, head_dim / 2)
    angles = torch.cat((angles, angles), dim=-1)
    return RotaryTables(angles.cos().to(like.dtype), angles.sin().to(like.dtype))


def causal_mask(exists: Tensor | None) -> Tensor | None:
    """Return which tokens each token attends to, (B, 1, L, L), given which tokens exist, (B, L).

    None stays None: without padding, attention is causal by itself.
    """
    if exists is None:
        return None
    length = exists.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=exists.device).tril()
    return causal & exists[:, None, None, :]


class _Attention(nn.Module):
    """Grouped-query attention, causal, with normalized queries and keys."""

    def __init__(self, config: TextNetworkConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.group_size = config.num_attention_heads // config.num_key_value_heads
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: RotaryTables, mask: Tensor | None) -> Tensor:
        def heads(projected: Tensor) -> Tensor:
            return projected.view(*x.shape[:2], -1, self.head_dim)  # (B, L, heads, head_dim)

        queries = _rotated(self.q_norm(heads(self.q_proj(x))).transpose(1, 2), rotary)
        keys = _rotated(self.k_norm(heads(self.k_proj(x))).transpose(1, 2), rotary)
        values = heads(self.v_proj(x)).transpose(1, 2)
        grouped = self.group_size > 1
        if grouped and mask is not None:
            # With a mask, torch would compute grouped queries in its slowest kernel.
            keys, values = (each.repeat_interleave(self.group_size, dim=1) for each in (keys, values))
        attended = functional.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None and x.shape[1] > 1,
            scale=self.head_dim**-0.5,
            enable_gqa=grouped and mask is None,
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    """SwiGLU: Shazeer 2020 (arXiv 2002.05202), equation 6."""

    def __init__(self, config: TextNetworkConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


def _rotated(x: Tensor, rotary: RotaryTables) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * rotary.cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * rotary.sin.unsqueeze(1)
