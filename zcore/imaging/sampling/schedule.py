"""The noise levels that a picture passes through.

Takes a number of steps and a shift; gives the levels. Plain arithmetic, no torch.

The grid of the official code (and of diffusers since 0.39): u_i = 1 - i / N for i = 0 .. N - 1, shifted to sigma_i =
k u_i / (1 + (k - 1) u_i), and 0 at the end. N steps are N forwards of the transformer. The shift k is fixed, 3 for
the published checkpoint; it does not follow from the picture's size.
"""


def sigmas(steps: int, shift: float) -> list[float]:
    """`steps` + 1 noise levels, from 1 down to 0. For 8 and 3.0: 1, .9545, .9, .8333, .75, .6429, .5, .3, 0."""
    even = (1 - index / steps for index in range(steps))
    # The formula above, divided by k above and below: this way the first level is exactly 1.
    return [*(level / (level + (1 - level) / shift) for level in even), 0.0]
