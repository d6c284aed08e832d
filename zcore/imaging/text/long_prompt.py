"""Embeddings of more tokens than the transformer can place, condensed to fit.

Takes an embedding, the limit and the mode; gives what fits. The layout's tail (the end of the user's message and the
assistant's line), on which a causal encoder has gathered the whole prompt, is never touched: only what stands before it
is condensed. Does not know text. The mode `truncate` works on tokens: see `token_count`.

The modes are those of the prototype (`llm-dit-experiments`), written from their formulas:

* `interpolate` resamples linearly and keeps both end points: row j of M lies at x = j (n - 1) / (M - 1) of n rows;
* `pool` averages rows floor(j n / M) .. ceil((j + 1) n / M) - 1;
* `attention_pool` averages within M equal regions, rows that differ from their neighbours counting more: importance is
  1 - mean cosine to the rows at distance 1 and 2, shifted to a minimum of 0.1, weights its softmax in the region.

All compute in float32 and give the dtype they got.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from zcore.imaging.text.token_count import room_before_tail

CompressionMode = Literal["interpolate", "pool", "attention_pool"]
LEAST_IMPORTANCE = 0.1


def compress(embeds: Tensor, tail: int, limit: int, mode: CompressionMode) -> Tensor:
    """(min(n, limit), hidden) of `embeds` (n, hidden); the last `tail` rows as they are. A copy only where needed."""
    if embeds.shape[0] <= limit:
        return embeds
    before = embeds[: embeds.shape[0] - tail]
    rows = room_before_tail(tail, limit)
    condensed = _CONDENSE[mode](before.float(), rows).to(embeds.dtype)
    return torch.cat((condensed, embeds[embeds.shape[0] - tail :]))


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
    """(n,): how much each row differs from its neighbours at distance 1 and 2."""
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


_CONDENSE = {"interpolate": _interpolate, "pool": _pool, "attention_pool": _attention_pool}
