"""Noise schedule: the noise levels (sigmas) of a generation, from a number of steps, a shift and a strength.

Plain arithmetic, without torch.

The grid is that of the official code, and of diffusers since 0.39: u_i = 1 - i / N for i = 0 .. N - 1, shifted to
sigma_i = k u_i / (1 + (k - 1) u_i), and 0 at the end. Without guidance, N steps are N forwards of the transformer. The
shift k is constant, 3 for the published checkpoint; it does not depend on the size of the image.

A strength s below 1 starts at u = s. The rule `continuous` starts at exactly that level and spends ceil(N s) forwards
on the rest, so every change of s changes the image; if N s is a whole number, the levels are those of the full grid.
The rule `diffusers` drops the first floor(N - N s) levels of the full grid, so with few steps many strengths give the
same image.
"""

from math import ceil

from zcore.request import StrengthRule


def sigmas(steps: int, shift: float, strength: float = 1.0, rule: StrengthRule = "continuous") -> list[float]:
    """Return the noise levels from the first down to 0, one more than there are forwards.

    For 8 steps and a shift of 3.0: 1, .9545, .9, .8333, .75, .6429, .5, .3, 0.
    """
    if rule == "diffusers":
        skipped = min(int(max(steps - steps * strength, 0)), steps - 1)
        return [*(_shifted(1 - index / steps, shift) for index in range(skipped, steps)), 0.0]
    # Rounded first: in floating point 50 * 0.14 is slightly more than 7.
    forwards = max(1, ceil(round(steps * strength, 9)))
    return [*(_shifted(strength * (1 - index / forwards), shift) for index in range(forwards)), 0.0]


def _shifted(level: float, shift: float) -> float:
    # The formula above with both sides divided by k: in this form the first level is exactly 1.
    return level / (level + (1 - level) / shift)
