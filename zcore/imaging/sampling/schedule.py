"""The noise levels that a picture passes through.

Takes a number of steps, a shift and, for a picture that does not begin from noise, its strength; gives the levels.
Plain arithmetic, no torch.

The grid of the official code (and of diffusers since 0.39): u_i = 1 - i / N for i = 0 .. N - 1, shifted to sigma_i =
k u_i / (1 + (k - 1) u_i), and 0 at the end. N steps are N forwards of the transformer. The shift k is fixed, 3 for
the published checkpoint; it does not follow from the picture's size.

A strength s below 1 begins at u = s. `continuous` begins at just that level and spends ceil(N s) forwards on what is
left, so that every change of s changes the picture; where N s is a whole number the levels are those of the full grid.
`diffusers` drops the first floor(N - N s) levels of the full grid, so that with few steps many strengths are the same.
"""

from math import ceil

from zcore.request import StrengthRule


def sigmas(steps: int, shift: float, strength: float = 1.0, rule: StrengthRule = "continuous") -> list[float]:
    """Noise levels from the first down to 0, one more than there are forwards.

    For 8 and 3.0: 1, .9545, .9, .8333, .75, .6429, .5, .3, 0.
    """
    if rule == "diffusers":
        skipped = min(int(max(steps - steps * strength, 0)), steps - 1)
        return [*(_shifted(1 - index / steps, shift) for index in range(skipped, steps)), 0.0]
    forwards = max(1, ceil(round(steps * strength, 9)))
    return [*(_shifted(strength * (1 - index / forwards), shift) for index in range(forwards)), 0.0]


def _shifted(level: float, shift: float) -> float:
    # The formula above, divided by k above and below: this way the first level is exactly 1.
    return level / (level + (1 - level) / shift)
