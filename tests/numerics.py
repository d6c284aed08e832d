"""Bounds for comparisons of floating-point results that hold on every CPU.

Two kernels for the same formula (another instruction set, thread count, library or batch shape) add the same terms in
another order and round after other operations. Each rounding is wrong by at most half the dtype's epsilon, relative to
the number that is rounded, so results drift apart by an amount that is proportional to the magnitude of the values, to
the epsilon, and to the number of roundings between input and output. An absolute bound states none of these and fails
on another machine. Results of the same kernels on the same shapes are equal bit for bit: compare those with
`torch.equal`.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ONE_KERNEL = 16
"""Roundings of one kernel: sums of up to a few hundred terms, whose errors have both signs and mostly cancel."""
ONE_FORWARD = 64
"""Roundings of a forward of a test network, which has at most nine blocks of about eight dependent kernels each.

Errors of both signs add up as the square root of their number: about 9 for 72 kernels, measured as 8.
"""
ONE_GENERATION = 4 * ONE_FORWARD
"""Roundings of eight denoising steps: sqrt(8) times those of a forward, rounded up; measured as 35."""


def deviation(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest magnitude of `expected`; both are compared in float64."""
    exact = expected.detach().double()
    return float((actual.detach().double() - exact).abs().max() / exact.abs().max())


def assert_close_relative(
    actual: Tensor, expected: Tensor, *, roundings: int, gain: float = 1.0, magnitude: float | None = None
) -> None:
    """Assert that two tensors of one shape differ by rounding only.

    The bound is `roundings` x `gain` epsilons of the coarser dtype, relative to the largest magnitude of `expected`.
    `gain` is the factor by which the formula multiplies the rounding errors of its inputs: guidance at scale s computes
    (1 + s) a - s b, so its gain is 1 + 2 s. Pass `magnitude` if the compared values are differences of larger ones: the
    rounding errors are relative to the larger ones.
    """
    assert actual.shape == expected.shape
    epsilon = max(torch.finfo(tensor.dtype).eps for tensor in (actual, expected))
    bound = roundings * gain * epsilon
    found = deviation(actual, expected)
    if magnitude is not None:
        found *= float(expected.detach().abs().max()) / magnitude
    assert found <= bound, f"deviates by {found:.2e} of the largest magnitude; rounding explains {bound:.2e}"


def assert_levels_close(actual: Image.Image | np.ndarray, expected: Image.Image | np.ndarray) -> None:
    """Assert that 8-bit images differ by at most one level.

    Rounding errors of a generation are below a hundredth of a level; they change a pixel only where the exact value is
    next to the limit between two levels, and then by one.
    """
    difference = np.asarray(actual, dtype=np.int16) - np.asarray(expected, dtype=np.int16)
    assert np.abs(difference).max() <= 1
