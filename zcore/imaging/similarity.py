"""How similar two images are: SSIM and PSNR.

SSIM: Wang, Bovik, Sheikh and Simoncelli, Image quality assessment: from error visibility to structural similarity, IEEE
Transactions on Image Processing 13 (4), 2004, with the paper's window and constants.
"""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

WINDOW_PX = 11
WINDOW_SIGMA_PX = 1.5
PEAK = 255.0
"""The range of a value."""

_C1 = (0.01 * PEAK) ** 2
_C2 = (0.03 * PEAK) ** 2


def ssim(image: Image.Image, reference: Image.Image) -> float:
    """Return the mean structural similarity of the images' luminance (ITU-R 601): 1 for equal images, -1 at least.

    Only windows that lie within the image count. Raises ValueError for sizes that differ or are below 11 px.
    """
    _check_sizes(image, reference)
    x, y = (torch.tensor(np.asarray(one.convert("L"), np.float64))[None, None] for one in (image, reference))
    mean_x, mean_y = _windowed_mean(x), _windowed_mean(y)
    variance_x = _windowed_mean(x * x) - mean_x**2
    variance_y = _windowed_mean(y * y) - mean_y**2
    covariance = _windowed_mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    contrast_and_structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return float((luminance * contrast_and_structure).mean())


def psnr_db(image: Image.Image, reference: Image.Image) -> float:
    """Return the peak signal-to-noise ratio over all RGB values, 10 log10(255² / mean squared error), in decibels.

    It is infinite for equal images. Raises ValueError for sizes that differ.
    """
    _check_sizes(image, reference)
    x, y = (np.asarray(one.convert("RGB"), np.float64) for one in (image, reference))
    mean_squared_error = float(np.mean((x - y) ** 2))
    return 10 * math.log10(PEAK**2 / mean_squared_error) if mean_squared_error else math.inf


def _windowed_mean(values: Tensor) -> Tensor:
    """Return the mean of (1, 1, H, W) in each Gaussian window: (1, 1, H - 10, W - 10)."""
    offsets = torch.arange(WINDOW_PX, dtype=values.dtype) - WINDOW_PX // 2
    weights = torch.exp(-(offsets**2) / (2 * WINDOW_SIGMA_PX**2))
    weights /= weights.sum()
    return functional.conv2d(functional.conv2d(values, weights[None, None, None, :]), weights[None, None, :, None])


def _check_sizes(image: Image.Image, reference: Image.Image) -> None:
    if image.size != reference.size:
        raise ValueError(f"images of different sizes cannot be compared: {image.size} and {reference.size}")
