"""The forward as one compiled graph.

Takes a mode of `torch.compile`; gives a function that is called as `forward` is, and compiles when it is first called.
Does not know when that pays.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit

from zcore.imaging.model.attention import Attend
from zcore.imaging.model.forward import Conditions, Transformer, forward, forward_skipping

Forward = Callable[[Transformer, Tensor, Conditions, Attend], Tensor]
ForwardSkipping = Callable[[Transformer, Tensor, Conditions, Attend, tuple[int, ...]], tuple[Tensor, Tensor]]


def compiled(mode: str) -> Forward:
    """`forward` without a break, one graph for every size, prompt length and step.

    One sample, several, and several with masks are a graph each, compiled when they first come. So are LoRAs by what
    they consist of: other layers, kinds or ranks (up to a power of two) are another graph, other values are not. What
    comes when torch holds as many graphs as it may is run as it stands.
    """
    return _compiled(forward, mode)


def compiled_skipping(mode: str) -> ForwardSkipping:
    """`forward_skipping`, as `compiled` is `forward`; other skipped blocks are another graph."""
    return _compiled(forward_skipping, mode)


def _compiled(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    graph: Any = cast(Any, torch).compile(function, fullgraph=True, mode=mode)

    def run(weights: Transformer, tokens: Tensor, conditions: Conditions, *rest: Any) -> Any:
        _mark_varying(tokens, conditions)
        try:
            return graph(weights, tokens, conditions, *rest)
        except FailOnRecompileLimitHit:
            return function(weights, tokens, conditions, *rest)

    return run


def _mark_varying(tokens: Tensor, conditions: Conditions) -> None:
    """Say which axes vary. Left to guess, torch takes axes of one length for one axis: 64 tokens for 64 channels."""
    mark: Any = cast(Any, torch)._dynamo.mark_dynamic
    rotary = (conditions.rotary.first, conditions.rotary.second)
    masks = (conditions.picture_mask, conditions.mask, conditions.order)
    for tensor in (tokens, conditions.caption, conditions.is_padding, *rotary, *masks):
        if tensor is not None:
            mark(tensor, 1)
