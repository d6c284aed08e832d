"""Finite values: what a generation computes is checked for NaN and infinity, which would become black or noisy pixels.

A check on the device costs one reduction; only `require_finite` waits for its result.
"""

import torch
from torch import Tensor

from zcore.errors import NonFiniteValues

CAUSES = (
    "usual causes are a LoRA or a guidance scale that is much too large, damaged weights, and float16; use a smaller "
    "scale, check the files, or load the model in bfloat16 or float32"
)


def finite_rows(values: Tensor) -> Tensor:
    """Return for each row of `values` (B, ...) whether all its values are finite: bool (B,), on the same device."""
    low, high = torch.aminmax(values.flatten(1), dim=1)  # NaN propagates to both
    return torch.isfinite(low) & torch.isfinite(high)


def require_finite(values: Tensor, subject: str) -> None:
    """Raise `NonFiniteValues` about `subject`, a plural, unless all values are finite. Waits for the device."""
    if not bool(finite_rows(values[None])):
        raise NonFiniteValues(f"{subject} are NaN or infinite; {CAUSES}")
