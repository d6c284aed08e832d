"""SSIM and PSNR against scikit-image and against values that follow from their definitions."""

import math

import numpy as np
import pytest
from PIL import Image

from zcore.imaging.similarity import psnr_db, ssim


def gray(value: int, size: tuple[int, int] = (32, 16)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def texture() -> tuple[Image.Image, Image.Image]:
    """Return a texture and the same with a pattern added, as whole numbers that every machine computes alike."""
    y, x = np.mgrid[0:48, 0:64]
    one = (x * 7 + y * 13) % 256
    other = (one + ((x * x + 3 * y) % 41) - 20).clip(0, 255)
    first, second = (Image.fromarray(values.astype(np.uint8)) for values in (one, other))
    return first, second


def test_a_textures_values_are_those_of_scikit_image() -> None:
    """From scikit-image 0.26: `structural_similarity` with the paper's window, and `peak_signal_noise_ratio`."""
    assert ssim(*texture()) == pytest.approx(0.9264581160134164, abs=1e-12)
    assert psnr_db(*texture()) == pytest.approx(26.806759873283514, abs=1e-12)


def test_an_image_equals_itself() -> None:
    image, _ = texture()
    assert ssim(image, image) == pytest.approx(1, abs=1e-12)
    assert psnr_db(image, image) == math.inf


def test_constant_images_differ_by_their_luminance_term_alone() -> None:
    c1 = (0.01 * 255) ** 2
    assert ssim(gray(100), gray(150)) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1), abs=1e-9)
    assert psnr_db(gray(100), gray(150)) == pytest.approx(20 * math.log10(255 / 50))


def test_an_inverted_texture_is_dissimilar() -> None:
    image, _ = texture()
    assert ssim(image, Image.fromarray(255 - np.asarray(image))) < -0.5


def test_psnr_counts_every_channel_and_ssim_luminance_only() -> None:
    """One of three channels off by 30: the mean squared error is 300."""
    red = Image.new("RGB", (32, 16), (130, 100, 100))
    assert psnr_db(red, gray(100)) == pytest.approx(10 * math.log10(255**2 / 300))
    assert ssim(red, gray(100)) == ssim(gray(109), gray(100))  # 0.299 * 30 = 8.97


@pytest.mark.parametrize("compare", [ssim, psnr_db])
def test_images_of_different_sizes_are_refused(compare: object) -> None:
    assert callable(compare)
    with pytest.raises(ValueError, match="different sizes"):
        compare(gray(1), gray(1, (16, 32)))
