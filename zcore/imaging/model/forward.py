"""The transformer's arithmetic: tensors in, tensors out, on the layers that diffusers holds the weights in.

Takes the module that the loader gave and batches of tokens; gives batches of tokens. Every function is pure: no lists
for batches, no host synchronisation, no complex numbers, nothing kept. Bit for bit the arithmetic of diffusers'
`ZImageTransformer2DModel` (Apache-2.0), whose layers are called one by one, so that whatever replaces a layer (LoRA,
quantised weights) counts. Does not know pictures, prompts and schedules.

B is the batch, N the picture's padded tokens, P the caption's, S = N + P of the longest sample, D the model's width.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from zcore.imaging.model.attention import Attend
from zcore.imaging.model.rope import Rotary, turn

PATCH = "2-1"
"""Which of the patch embedders: two latents a side, one frame."""

Layer = Callable[[Tensor], Tensor]


class Attention(Protocol):
    """diffusers' `Attention`, as far as it is used."""

    heads: int
    to_q: Layer
    to_k: Layer
    to_v: Layer
    norm_q: Layer
    norm_k: Layer
    to_out: Sequence[Layer]


class Block(Protocol):
    """diffusers' `ZImageTransformerBlock`; those of the context refiner have no `adaLN_modulation`."""

    attention: Attention
    feed_forward: Layer
    attention_norm1: Layer
    attention_norm2: Layer
    ffn_norm1: Layer
    ffn_norm2: Layer
    adaLN_modulation: Layer


class FinalLayer(Protocol):
    """diffusers' `FinalLayer`."""

    norm_final: Layer
    linear: Layer
    adaLN_modulation: Layer


class Transformer(Protocol):
    """diffusers' `ZImageTransformer2DModel`, as far as it is used."""

    config: Any
    t_scale: float
    t_embedder: Layer
    cap_embedder: Layer
    cap_pad_token: Tensor
    x_pad_token: Tensor
    all_x_embedder: Mapping[str, Layer]
    all_final_layer: Mapping[str, FinalLayer]
    context_refiner: Sequence[Block]
    noise_refiner: Sequence[Block]
    layers: Sequence[Block]


@dataclass(frozen=True)
class Modulation:
    """What a noise level does to the network: factors of every modulated block and of the final layer.

    `blocks` is (noise refiner's and main blocks, 4, B, 1, D): scale and gate of attention, scale and gate of the feed
    forward. `final` is (B, 1, D).
    """

    blocks: Tensor
    final: Tensor


@dataclass(frozen=True)
class Conditions:
    """All of a forward but the latents.

    Where samples differ in length, the shorter are padded at their end, and a mask says which tokens there are; it is
    None where they do not differ. `order` says which of the N + P tokens come first where pictures differ in length.
    """

    caption: Tensor  # (B, P, D), refined
    rotary: Rotary  # of (B, S) tokens, the picture's tokens before the caption's
    is_padding: Tensor  # (B, N, 1), boolean: the tokens that fill a picture up to a multiple of 32
    modulation: Modulation
    picture_mask: Tensor | None  # (B, N), boolean
    mask: Tensor | None  # (B, S), boolean
    order: Tensor | None  # (B, S, 1), int64


def modulators(weights: Transformer) -> list[Layer]:
    """What makes the factors of the noise refiner's and the main blocks, in this order."""
    return [block.adaLN_modulation for block in (*weights.noise_refiner, *weights.layers)]


def modulate(weights: Transformer, modulators: Sequence[Layer], t: Tensor, dtype: torch.dtype) -> Modulation:
    """The factors at times `t` = 1 - sigma, float32 (B,)."""
    moment = weights.t_embedder(t * weights.t_scale).to(dtype)
    raw = torch.stack([modulator(moment) for modulator in modulators])
    scale1, gate1, scale2, gate2 = raw.unsqueeze(2).chunk(4, dim=-1)  # (blocks, B, 1, D)
    final = 1.0 + weights.all_final_layer[PATCH].adaLN_modulation(moment)
    return Modulation(
        torch.stack((1.0 + scale1, gate1.tanh(), 1.0 + scale2, gate2.tanh()), 1),
        final.unsqueeze(1),
    )


def refine_caption(
    weights: Transformer, prompts: Tensor, is_padding: Tensor, rotary: Rotary, mask: Tensor | None, attend: Attend
) -> Tensor:
    """What the blocks see of prompts (B, P, hidden), whatever the noise level: (B, P, D). `is_padding` is (B, P, 1)."""
    caption = torch.where(is_padding, weights.cap_pad_token, weights.cap_embedder(prompts))
    for block in weights.context_refiner:
        caption = caption + block.attention_norm2(
            _attention(block.attention, block.attention_norm1(caption), rotary, mask, attend)
        )
        caption = caption + block.ffn_norm2(block.feed_forward(block.ffn_norm1(caption)))
    return caption


def forward(weights: Transformer, tokens: Tensor, conditions: Conditions, attend: Attend) -> Tensor:
    """The whole network: a picture's tokens (B, N, 64) in the weights' dtype to their velocity, float32 (B, N, 64)."""
    hidden = begin(weights, tokens, conditions, attend)
    hidden = run_layers(weights, hidden, range(len(weights.layers)), conditions, attend)
    return finish(weights, hidden, tokens.shape[1], conditions)


def forward_skipping(
    weights: Transformer, tokens: Tensor, conditions: Conditions, attend: Attend, skipped: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """What `forward` gives, and what it would give without the main blocks `skipped`, bit for bit.

    The blocks before the first of these are the same for both, and run once. Raises ValueError for no blocks.
    """
    first, count = min(skipped), len(weights.layers)
    prefix = run_layers(weights, begin(weights, tokens, conditions, attend), range(first), conditions, attend)
    kept = [index for index in range(first, count) if index not in skipped]
    whole = run_layers(weights, prefix, range(first, count), conditions, attend)
    without = run_layers(weights, prefix, kept, conditions, attend)
    length = tokens.shape[1]
    return finish(weights, whole, length, conditions), finish(weights, without, length, conditions)


def begin(weights: Transformer, tokens: Tensor, conditions: Conditions, attend: Attend) -> Tensor:
    """What enters the main blocks, (B, S, D): the embedded and refined picture, and the caption behind it."""
    length = tokens.shape[1]
    rotary = Rotary(conditions.rotary.first[:, :length], conditions.rotary.second[:, :length])
    picture = torch.where(conditions.is_padding, weights.x_pad_token, weights.all_x_embedder[PATCH](tokens))
    for index, block in enumerate(weights.noise_refiner):
        factors = conditions.modulation.blocks[index]
        picture = _block(block, picture, rotary, factors, conditions.picture_mask, attend)
    hidden = torch.cat((picture, conditions.caption), 1)
    return hidden if conditions.order is None else torch.take_along_dim(hidden, conditions.order, 1)


def run_layers(
    weights: Transformer, hidden: Tensor, layers: Iterable[int], conditions: Conditions, attend: Attend
) -> Tensor:
    """The main blocks `layers` in this order, from hidden state to hidden state (B, S, D); others are left out."""
    refiners = len(weights.noise_refiner)
    for index in layers:
        factors = conditions.modulation.blocks[refiners + index]
        hidden = _block(weights.layers[index], hidden, conditions.rotary, factors, conditions.mask, attend)
    return hidden


def finish(weights: Transformer, hidden: Tensor, length: int, conditions: Conditions) -> Tensor:
    """The velocity of the picture's `length` tokens, float32: the negative of what the network puts out."""
    final = weights.all_final_layer[PATCH]
    return -final.linear(final.norm_final(hidden[:, :length]) * conditions.modulation.final).float()


def _block(
    block: Block, hidden: Tensor, rotary: Rotary, factors: Tensor, mask: Tensor | None, attend: Attend
) -> Tensor:
    scale1, gate1, scale2, gate2 = factors.unbind()  # (B, 1, D)
    seen = _attention(block.attention, block.attention_norm1(hidden) * scale1, rotary, mask, attend)
    hidden = hidden + gate1 * block.attention_norm2(seen)
    return hidden + gate2 * block.ffn_norm2(block.feed_forward(block.ffn_norm1(hidden) * scale2))


def _attention(attention: Attention, x: Tensor, rotary: Rotary, mask: Tensor | None, attend: Attend) -> Tensor:
    def heads(projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:2], attention.heads, -1)  # (B, S, heads, head_dim)

    queries = turn(attention.norm_q(heads(attention.to_q(x))), rotary)
    keys = turn(attention.norm_k(heads(attention.to_k(x))), rotary)
    seen = attend(queries, keys, heads(attention.to_v(x)), mask)
    return attention.to_out[0](seen.flatten(2))
