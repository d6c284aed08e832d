"""DyPE: rotary frequencies that let a transformer generate larger images than it was trained for, by noise level.

Takes a request's settings, an image's patches, and a noise level; returns frequencies and an amplitude for each axis of
positions. Pure arithmetic in float64 on a few dozen numbers per step; `rope.rotary` makes the table. Does not depend on
networks, schedules, or tokens.

Based on Issachar et al. 2025, "DyPE: Dynamic Position Extrapolation for Ultra High Resolution Diffusion"
(arXiv:2510.20766; code under MIT, and patent pending according to its authors), with the thresholds of their code since
February 2026, multiplied by kappa; and on vision_yarn of ComfyUI-DyPE (Apache-2.0). The static forms are NTK scaling
and YaRN (Peng et al. 2023, arXiv:2309.00071).

With d channels on an axis, k = 0 .. d/2 - 1, a side s times the trained one, and f_k = theta ** (-2 k / d):

    linear   f_k / s
    ntk      (theta * s ** (d / (d - 2))) ** (-2 k / d)
    yarn     linear for slow k, ntk between, f_k for fast ones; two ramps, at wave lengths of the trained side / r

Early steps decide the composition and need the full scaling; late steps add detail and need none. At a noise level t,
ntk's power is scale * t ** exponent, and yarn's ramps move by kappa = scale / 2 * t ** exponent, so that at t = 0 all
frequencies are f_k again. Scale 2 and exponent 2 are the authors' values. The authors' ramps cross each other for small
t, which makes all frequencies linear, and divide by zero at t = 0; here they end at the last channel instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, inf, log, pi

import torch
from torch import Tensor

from zcore.imaging.network.rope import frequencies
from zcore.request import Dype
from zcore.sizes import SIDE_MULTIPLE_PX

NOTICE = (
    "Generated with DyPE (github.com/guyyariv/DyPE). Notice of its authors: patent pending; "
    "for commercial use contact the authors."
)
"""The notice recorded with every image that DyPE affected."""

LINEAR_TO_NTK = (1.25, 0.75)
NTK_TO_BASE = (16.0, 2.0)
"""Rotations that a channel completes along the trained side where a ramp begins and ends."""
NARROWEST_RAMP = 1e-3


@dataclass(frozen=True, slots=True)
class AxisRotation:
    """The rotation along one axis: radians per position, float64 (dim / 2,), and the factor on rotated pairs."""

    frequencies: Tensor
    amplitude: float


def stretches(dype: Dype | None, width_px: int, height_px: int) -> bool:
    """Return whether these settings change anything in an image of this size."""
    return dype is not None and dype.scale > 0 and max(width_px, height_px) > dype.base_resolution


def axis_rotations(
    dype: Dype, theta: float, dims: Sequence[int], patches: tuple[int, int], sigma: float
) -> tuple[AxisRotation, ...]:
    """Return the rotations of (frame, row, column) at a noise level, for an image of `patches` rows and columns.

    Those of frames, which distinguish a caption's tokens, do not change.
    """
    trained = dype.base_resolution / SIDE_MULTIPLE_PX
    scales = [max(1.0, count / trained) for count in patches]
    ntk_scales = scales if dype.anisotropic else [max(scales)] * 2
    spatial = (
        _axis_rotation(dype, theta, dim, trained, linear_scale, ntk_scale, sigma)
        for dim, linear_scale, ntk_scale in zip(
            dims[1:], scales if dype.method == "vision_yarn" else ntk_scales, ntk_scales, strict=True
        )
    )
    return AxisRotation(frequencies(theta, dims[:1])[0], 1.0), *spatial


def ntk_frequencies(theta: float, dim: int, scale: float, power: float = 1.0) -> Tensor:
    """Return the frequencies for a theta scale ** (power dim / (dim - 2)) times as large: the slowest become linear."""
    (slowed,) = frequencies(theta * max(1.0, scale ** (power * dim / (dim - 2))), [dim])
    return slowed


def yarn_frequencies(
    theta: float,
    dim: int,
    trained: float,
    scales: tuple[float, float],
    thresholds: tuple[tuple[float, float], tuple[float, float]],
) -> Tensor:
    """Return a mixture of linear (first of `scales`), ntk (second), and base frequencies.

    The two pairs of `thresholds` bound the ramps between them, in rotations along the `trained` positions.
    """
    (base,) = frequencies(theta, [dim])
    to_ntk, to_base = (_ramp(pair, theta, dim, trained) for pair in thresholds)
    stretched = base / scales[0] * to_ntk + ntk_frequencies(theta, dim, scales[1]) * (1 - to_ntk)
    return stretched * to_base + base * (1 - to_base)


def _axis_rotation(
    dype: Dype, theta: float, dim: int, trained: float, linear_scale: float, ntk_scale: float, sigma: float
) -> AxisRotation:
    strength = dype.scale * sigma**dype.exponent
    if dype.method == "ntk":
        return AxisRotation(ntk_frequencies(theta, dim, ntk_scale, strength if dype.dynamic else 1.0), 1.0)
    kappa = strength / 2 if dype.dynamic else 1.0
    to_ntk, to_base = ((high * kappa, low * kappa) for high, low in (LINEAR_TO_NTK, NTK_TO_BASE))
    fading = min(1.0, sigma / dype.start_sigma) ** dype.exponent if dype.dynamic and dype.method != "yarn" else 1.0
    return AxisRotation(
        yarn_frequencies(theta, dim, trained, (linear_scale, ntk_scale), (to_ntk, to_base)),
        1.0 + 0.1 * log(ntk_scale) * fading,
    )


def _ramp(rotations: tuple[float, float], theta: float, dim: int, trained: float) -> Tensor:
    """Return 0 for channels with more rotations along the trained side than the first bound, 1 below the second."""

    def channel(count: float) -> float:
        return inf if count <= 0 else dim * log(trained / (2 * pi * count)) / (2 * log(theta))

    half = dim // 2
    low = floor(min(max(channel(rotations[0]), 0), half))
    high = ceil(min(max(channel(rotations[1]), 0), half))
    return ((torch.arange(half, dtype=torch.float64) - low) / max(high - low, NARROWEST_RAMP)).clamp(0, 1)
