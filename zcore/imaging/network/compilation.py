"""The forward as one compiled graph.

Takes a mode of `torch.compile`; returns a function with the signature of `forward` that compiles on its first call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zcore.imaging.kernels.attention import Attend
from zcore.imaging.network.forward import Conditions, Transformer, forward, forward_skipping

Forward = Callable[[Transformer, Tensor, Conditions, Attend], Tensor]
ForwardSkipping = Callable[[Transformer, Tensor, Conditions, Attend, tuple[int, ...]], tuple[Tensor, Tensor]]

_untyped: Any = torch  # the types of its compiler are incomplete


def compiled(mode: str) -> Forward:
    """Return `forward` compiled without a break: one graph for every size, prompt length, and step.

    One sample, several, and several with masks are a graph each, compiled on first use. LoRAs with other layers, kinds,
    or ranks (up to a power of two) need another graph; those with other values do not. When torch's limit of graphs is
    reached, further variants run without compilation.
    """
    return _compiled(forward, mode)


def compiled_skipping(mode: str) -> ForwardSkipping:
    """Return `forward_skipping` compiled likewise; other skipped blocks need another graph."""
    return _compiled(forward_skipping, mode)


def _compiled(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    # Imported here, because it brings torch's compiler, which takes as long to import as the rest of torch.
    from torch._dynamo.exc import FailOnRecompileLimitHit

    graph = _untyped.compile(function, fullgraph=True, mode=mode)

    def run(weights: Transformer, tokens: Tensor, conditions: Conditions, *rest: Any) -> Any:
        _mark_varying(tokens, conditions)
        try:
            return graph(weights, tokens, conditions, *rest)
        except FailOnRecompileLimitHit:
            return function(weights, tokens, conditions, *rest)

    return run


def _mark_varying(tokens: Tensor, conditions: Conditions) -> None:
    """Mark the axes that vary. Otherwise torch takes axes of equal length for the same axis: 64 tokens, 64 channels."""
    mark = _untyped._dynamo.mark_dynamic
    rotary = (conditions.rotary.first, conditions.rotary.second)
    masks = (conditions.image_mask, conditions.mask, conditions.order)
    for tensor in (tokens, conditions.caption, conditions.is_padding, *rotary, *masks):
        if tensor is not None:
            mark(tensor, 1)
