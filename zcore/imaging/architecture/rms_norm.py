"""Root mean square normalization, as both transformers of a checkpoint use it.

Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4. Computes in float32 and equals, bit for bit, `RMSNorm` of
diffusers and `Qwen3RMSNorm` of transformers (both Apache-2.0).
"""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Divide the last axis, of length `width`, by its root mean square, and scale it by a weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width), in the weight's dtype."""
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return (x * torch.rsqrt(variance + self.eps)).to(self.weight.dtype) * self.weight
