"""DyPE: rotary frequencies that let a transformer paint larger than it was trained to, by noise level.

Takes what a request says, a picture's patches and a noise level; gives frequencies and an amplitude for each axis of
places. Pure arithmetic in float64, a few dozen numbers a step: `rope.rotary` makes the table. Does not know networks,
schedules and tokens.

After Issachar et al. 2025, "DyPE: Dynamic Position Extrapolation for Ultra High Resolution Diffusion"
(arXiv:2510.20766; code MIT, and by its authors' word patent pending), with its thresholds as in their code since
February 2026, multiplied by kappa; and after vision_yarn of ComfyUI-DyPE (Apache-2.0). The static forms are NTK
scaling and YaRN (Peng et al. 2023, arXiv:2309.00071).

With d channels on an axis, k = 0 .. d/2 - 1, a side s times the trained one, and f_k = theta ** (-2 k / d):

    linear   f_k / s
    ntk      (theta * s ** (d / (d - 2))) ** (-2 k / d)
    yarn     linear for slow k, ntk between, f_k for fast ones; two ramps, at wave lengths of the trained side / r

Early steps lay out the picture and need all of that, late ones only detail and none: at a noise level t, ntk's power is
scale * t ** exponent, and yarn's ramps move by kappa = scale / 2 * t ** exponent, so that at t = 0 all f_k are back.
Scale 2 and exponent 2 are the authors' values. The authors' ramps cross each other for small t, which turns all
frequencies linear, and divide by zero at t = 0; here they end at the last channel instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, inf, log, pi

import torch
from torch import Tensor

from zcore.imaging.model.rope import frequencies
from zcore.request import Dype
from zcore.sizes import SIDE_MULTIPLE_PX

NOTICE = (
    "Painted with DyPE (github.com/guyyariv/DyPE). Its authors say: patent pending; "
    "for commercial use contact the authors."
)
"""What goes with every picture that it had a part in."""

LINEAR_TO_NTK = (1.25, 0.75)
NTK_TO_BASE = (16.0, 2.0)
"""Turns that a channel makes along the trained side, where a ramp begins and ends."""
NARROWEST_RAMP = 1e-3


@dataclass(frozen=True, slots=True)
class AxisTurn:
    """How places on an axis turn: radians a place, float64 (dim / 2,), and the length of the turned pair."""

    frequencies: Tensor
    amplitude: float


def stretches(dype: Dype | None, width_px: int, height_px: int) -> bool:
    """Whether it changes anything at all in a picture of this size."""
    return dype is not None and dype.scale > 0 and max(width_px, height_px) > dype.base_resolution


def axis_turns(
    dype: Dype, theta: float, dims: Sequence[int], patches: tuple[int, int], sigma: float
) -> tuple[AxisTurn, ...]:
    """The turns of (frame, row, column) at a noise level, for a picture of `patches` rows and columns.

    Frames, which tell a caption's tokens apart, turn as ever.
    """
    trained = dype.base_resolution / SIDE_MULTIPLE_PX
    own = [max(1.0, count / trained) for count in patches]
    wide = own if dype.anisotropic else [max(own)] * 2
    spatial = (
        _turn(dype, theta, dim, trained, linear_scale, ntk_scale, sigma)
        for dim, linear_scale, ntk_scale in zip(
            dims[1:], own if dype.method == "vision_yarn" else wide, wide, strict=True
        )
    )
    return AxisTurn(frequencies(theta, dims[:1])[0], 1.0), *spatial


def ntk_frequencies(theta: float, dim: int, scale: float, power: float = 1.0) -> Tensor:
    """Those of a theta that is scale ** (power dim / (dim - 2)) times as large, so that the slowest are linear."""
    (slowed,) = frequencies(theta * max(1.0, scale ** (power * dim / (dim - 2))), [dim])
    return slowed


def yarn_frequencies(
    theta: float,
    dim: int,
    trained: float,
    scales: tuple[float, float],
    thresholds: tuple[tuple[float, float], tuple[float, float]],
) -> Tensor:
    """Linear (first of `scales`), ntk (second) and base frequencies, by ramps at two pairs of `thresholds`, in turns
    along the `trained` places.
    """
    (base,) = frequencies(theta, [dim])
    to_ntk, to_base = (_ramp(pair, theta, dim, trained) for pair in thresholds)
    stretched = base / scales[0] * to_ntk + ntk_frequencies(theta, dim, scales[1]) * (1 - to_ntk)
    return stretched * to_base + base * (1 - to_base)


def _turn(
    dype: Dype, theta: float, dim: int, trained: float, linear_scale: float, ntk_scale: float, sigma: float
) -> AxisTurn:
    strength = dype.scale * sigma**dype.exponent
    if dype.method == "ntk":
        return AxisTurn(ntk_frequencies(theta, dim, ntk_scale, strength if dype.dynamic else 1.0), 1.0)
    kappa = strength / 2 if dype.dynamic else 1.0
    to_ntk, to_base = ((high * kappa, low * kappa) for high, low in (LINEAR_TO_NTK, NTK_TO_BASE))
    fading = min(1.0, sigma / dype.start_sigma) ** dype.exponent if dype.dynamic and dype.method != "yarn" else 1.0
    return AxisTurn(
        yarn_frequencies(theta, dim, trained, (linear_scale, ntk_scale), (to_ntk, to_base)),
        1.0 + 0.1 * log(ntk_scale) * fading,
    )


def _ramp(turns: tuple[float, float], theta: float, dim: int, trained: float) -> Tensor:
    """0 for channels that turn more often than the first along the trained side, 1 for those below the second."""

    def channel(count: float) -> float:
        return inf if count <= 0 else dim * log(trained / (2 * pi * count)) / (2 * log(theta))

    half = dim // 2
    low = floor(min(max(channel(turns[0]), 0), half))
    high = ceil(min(max(channel(turns[1]), 0), half))
    return ((torch.arange(half, dtype=torch.float64) - low) / max(high - low, NARROWEST_RAMP)).clamp(0, 1)
