"""Compression of embeddings with more tokens than the transformer supports.

Takes an embedding, the limit, and the mode. Compresses only what precedes the chat format's tail (the end of the user's
message and the assistant's line): in the tail, a causal encoder has accumulated the whole prompt. The mode `truncate`
works on tokens: see `token_count`.

The modes are those of the prototype (`llm-dit-experiments`), implemented from their formulas:

* `interpolate` resamples linearly and preserves both end points: row j of M lies at x = j (n - 1) / (M - 1) of n rows;
* `pool` averages rows floor(j n / M) .. ceil((j + 1) n / M) - 1;
* `attention_pool` averages within M equal regions, with more weight on rows that differ from their neighbours:
  importance is 1 - mean cosine to the rows at distance 1 and 2, shifted to a minimum of 0.1, and the weights are its
  softmax within the region.

All compute in float32 and return the input's dtype.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from zcore.prompt.token_count import tokens_before_tail

CompressionMode = Literal["interpolate", "pool", "attention_pool"]
LEAST_IMPORTANCE = 0.1


def compress(embeds: Tensor, tail: int, limit: int, mode: CompressionMode) -> Tensor:
    """Compress `embeds` (n, hidden) to (min(n, limit), hidden); the last `tail` rows are unchanged.

    Returns `embeds` itself if it fits. Raises `PromptTooLong` if the tail alone reaches the limit.
    """
    if embeds.shape[0] <= limit:
        return embeds
    before = embeds[: embeds.shape[0] - tail]
    rows = tokens_before_tail(tail, limit)
    compressed = _COMPRESS[mode](before.float(), rows).to(embeds.dtype)
    return torch.cat((compressed, embeds[embeds.shape[0] - tail :]))


def _interpolate(rows: Tensor, count: int) -> Tensor:
    channels_first = rows.T[None]  # (1, hidden, n)
    return functional.interpolate(channels_first, size=count, mode="linear", align_corners=True)[0].T


def _pool(rows: Tensor, count: int) -> Tensor:
    return functional.adaptive_avg_pool1d(rows.T[None], count)[0].T


def _attention_pool(rows: Tensor, count: int) -> Tensor:
    n = rows.shape[0]
    region = torch.arange(n, device=rows.device) * count // n  # (n,)
    importance = _importance(rows)
    strength = importance.exp()  # bounded by e^2.1, so a softmax needs no shift
    total = torch.zeros(count, device=rows.device).index_add(0, region, strength)
    weighted = torch.zeros(count, rows.shape[1], device=rows.device).index_add(0, region, rows * strength[:, None])
    return weighted / total[:, None]


def _importance(rows: Tensor) -> Tensor:
    """Return how much each row differs from its neighbours at distance 1 and 2, (n,)."""
    units = functional.normalize(rows, dim=1)
    alike = torch.zeros(rows.shape[0], device=rows.device)
    neighbours = torch.zeros_like(alike)
    for distance in (1, 2):
        cosine = (units[:-distance] * units[distance:]).sum(1)  # (n - distance,)
        for part in (slice(None, -distance), slice(distance, None)):
            alike[part] += cosine
            neighbours[part] += 1
    importance = 1 - alike / neighbours
    return importance - importance.min() + LEAST_IMPORTANCE


_COMPRESS = {"interpolate": _interpolate, "pool": _pool, "attention_pool": _attention_pool}
