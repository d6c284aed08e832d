"""The transformer's arithmetic, as pure functions of tensors that call the layers of a `TransformerNetwork`.

Takes the module from the loader and batches of tokens; returns batches of tokens. The functions use no lists for
batches, no host synchronization, and no complex numbers, and retain nothing. The arithmetic equals, bit for bit, that
of diffusers' `ZImageTransformer2DModel` (Apache-2.0). Its layers are called one by one, so that any replacement of a
layer (LoRA, quantized weights) takes effect. Does not depend on images, prompts, or schedules.

B is the batch, N the number of the image's padded tokens, P of the caption's, S = N + P of the longest sample, D the
model's width.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from zcore.imaging.kernels.attention import Attend
from zcore.imaging.network.rope import Rotary, apply_rotary

PATCH = "2-1"
"""The patch embedder that is used: two latents per side, one frame."""

Layer = Callable[[Tensor], Tensor]


class Attention(Protocol):
    """The part of diffusers' `Attention` that is used."""

    heads: int
    to_q: Layer
    to_k: Layer
    to_v: Layer
    norm_q: Layer
    norm_k: Layer
    to_out: Sequence[Layer]


class Block(Protocol):
    """The part of diffusers' `ZImageTransformerBlock` that is used. Context refiners lack `adaLN_modulation`."""

    attention: Attention
    feed_forward: Layer
    attention_norm1: Layer
    attention_norm2: Layer
    ffn_norm1: Layer
    ffn_norm2: Layer
    adaLN_modulation: Layer


class FinalLayer(Protocol):
    """The part of diffusers' `FinalLayer` that is used."""

    norm_final: Layer
    linear: Layer
    adaLN_modulation: Layer


class Transformer(Protocol):
    """The part of diffusers' `ZImageTransformer2DModel` that is used."""

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
    """The factors of every modulated block and of the final layer at one noise level.

    `blocks` is (noise refiner's and main blocks, 4, B, 1, D): scale and gate of attention, scale and gate of the feed
    forward. `final` is (B, 1, D).
    """

    blocks: Tensor
    final: Tensor


@dataclass(frozen=True)
class Conditions:
    """All inputs of a forward except the latents.

    If samples differ in length, the shorter ones are padded at their end, and a mask marks the tokens that exist; it is
    None if they do not differ. If images differ in length, `order` moves each sample's tokens before its padding.
    """

    caption: Tensor  # (B, P, D), refined
    rotary: Rotary  # for (B, S) tokens, those of the image before those of the caption
    is_padding: Tensor  # (B, N, 1), boolean: the tokens that pad an image to a multiple of 32
    modulation: Modulation
    image_mask: Tensor | None  # (B, N), boolean
    mask: Tensor | None  # (B, S), boolean
    order: Tensor | None  # (B, S, 1), int64


def modulators(weights: Transformer) -> list[Layer]:
    """Return the layers that compute the factors of the noise refiner's and the main blocks, in this order."""
    return [block.adaLN_modulation for block in (*weights.noise_refiner, *weights.layers)]


def modulate(weights: Transformer, modulators: Sequence[Layer], t: Tensor, dtype: torch.dtype) -> Modulation:
    """Compute the factors at times `t` = 1 - sigma, float32 (B,)."""
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
    """Embed and refine prompts (B, P, hidden) to captions (B, P, D), which are the same at every noise level.

    `is_padding` is (B, P, 1).
    """
    caption = torch.where(is_padding, weights.cap_pad_token, weights.cap_embedder(prompts))
    for block in weights.context_refiner:
        caption = caption + block.attention_norm2(
            _attention(block.attention, block.attention_norm1(caption), rotary, mask, attend)
        )
        caption = caption + block.ffn_norm2(block.feed_forward(block.ffn_norm1(caption)))
    return caption


def forward(weights: Transformer, tokens: Tensor, conditions: Conditions, attend: Attend) -> Tensor:
    """Run the whole network: image tokens (B, N, 64) in the weights' dtype to their velocity, float32 (B, N, 64)."""
    hidden = begin(weights, tokens, conditions, attend)
    hidden = run_layers(weights, hidden, range(len(weights.layers)), conditions, attend)
    return finish(weights, hidden, tokens.shape[1], conditions)


def forward_skipping(
    weights: Transformer, tokens: Tensor, conditions: Conditions, attend: Attend, skipped: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Return the result of `forward`, and its result without the main blocks `skipped`, bit for bit.

    The blocks before the first skipped one are the same for both and run once. Raises `ValueError` if `skipped` is
    empty.
    """
    first, count = min(skipped), len(weights.layers)
    prefix = run_layers(weights, begin(weights, tokens, conditions, attend), range(first), conditions, attend)
    remaining = [index for index in range(first, count) if index not in skipped]
    whole = run_layers(weights, prefix, range(first, count), conditions, attend)
    without = run_layers(weights, prefix, remaining, conditions, attend)
    length = tokens.shape[1]
    return finish(weights, whole, length, conditions), finish(weights, without, length, conditions)


def begin(weights: Transformer, tokens: Tensor, conditions: Conditions, attend: Attend) -> Tensor:
    """Return the input of the main blocks, (B, S, D): the embedded and refined image, followed by the caption."""
    length = tokens.shape[1]
    rotary = Rotary(conditions.rotary.first[:, :length], conditions.rotary.second[:, :length])
    image = torch.where(conditions.is_padding, weights.x_pad_token, weights.all_x_embedder[PATCH](tokens))
    for index, block in enumerate(weights.noise_refiner):
        factors = conditions.modulation.blocks[index]
        image = _block(block, image, rotary, factors, conditions.image_mask, attend)
    hidden = torch.cat((image, conditions.caption), 1)
    return hidden if conditions.order is None else torch.take_along_dim(hidden, conditions.order, 1)


def run_layers(
    weights: Transformer, hidden: Tensor, layers: Iterable[int], conditions: Conditions, attend: Attend
) -> Tensor:
    """Run the main blocks `layers` in this order, and no others, from hidden state to hidden state (B, S, D)."""
    refiners = len(weights.noise_refiner)
    for index in layers:
        factors = conditions.modulation.blocks[refiners + index]
        hidden = _block(weights.layers[index], hidden, conditions.rotary, factors, conditions.mask, attend)
    return hidden


def finish(weights: Transformer, hidden: Tensor, length: int, conditions: Conditions) -> Tensor:
    """Return the velocity of the image's `length` tokens, float32: the negative of the network's output."""
    final = weights.all_final_layer[PATCH]
    return -final.linear(final.norm_final(hidden[:, :length]) * conditions.modulation.final).float()


def _block(
    block: Block, hidden: Tensor, rotary: Rotary, factors: Tensor, mask: Tensor | None, attend: Attend
) -> Tensor:
    scale1, gate1, scale2, gate2 = factors.unbind()  # (B, 1, D)
    attended = _attention(block.attention, block.attention_norm1(hidden) * scale1, rotary, mask, attend)
    hidden = hidden + gate1 * block.attention_norm2(attended)
    return hidden + gate2 * block.ffn_norm2(block.feed_forward(block.ffn_norm1(hidden) * scale2))


def _attention(attention: Attention, x: Tensor, rotary: Rotary, mask: Tensor | None, attend: Attend) -> Tensor:
    def heads(projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:2], attention.heads, -1)  # (B, S, heads, head_dim)

    queries = apply_rotary(attention.norm_q(heads(attention.to_q(x))), rotary)
    keys = apply_rotary(attention.norm_k(heads(attention.to_k(x))), rotary)
    attended = attend(queries, keys, heads(attention.to_v(x)), mask)
    return attention.to_out[0](attended.flatten(2))
