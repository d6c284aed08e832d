"""The VAE processes large images in tiles: without seams or frames, and close to the result of one piece."""

import random
from itertools import pairwise
from math import log10
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from tests.numerics import ONE_KERNEL, assert_close_relative
from zcore.demo.render import render
from zcore.demo.vocabulary import Composition, Thing
from zcore.errors import ConfigurationError
from zcore.imaging.network import vae as vae_module
from zcore.imaging.network.tiling import Tiling, spans
from zcore.imaging.network.vae import VaeCodec
from zcore.imaging.pipeline import GenerationResult, Inputs, ZImagePipeline
from zcore.imaging.weights.loader import Placement, load_vae
from zcore.request import GenerationRequest

CPU = torch.device("cpu")
TILING = Tiling(size_px=128, overlap_px=32)


@pytest.fixture(scope="module")
def vae(demo_folder: Path) -> nn.Module:
    return load_vae(demo_folder, Placement(CPU, torch.float32))


@pytest.fixture(scope="module")
def codec(vae: nn.Module) -> VaeCodec:
    return VaeCodec(vae, CPU, torch.float32)


def rendered(width: int, height: int) -> Image.Image:
    return Image.fromarray(
        render(Composition("center", (Thing("star", "red"),), "light blue"), width, height, random.Random(3))
    )


def encoded(codec: VaeCodec, image: Image.Image, tiled: bool) -> Tensor:
    with torch.inference_mode():
        return codec.sample_latents(
            codec.encode_latents(image, TILING if tiled else None), torch.Generator().manual_seed(5)
        )


def decoded(codec: VaeCodec, latents: Tensor, tiled: bool) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(codec.decode_latents(latents, TILING if tiled else None)).astype(float)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * log10(255**2 / float(np.square(one - other).mean()))


# Positions of tiles


@given(st.integers(1, 700), st.integers(2, 200), st.data())
def test_tiles_cover_everything_and_their_weights_add_up_to_one(length: int, size: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, size // 2))
    placed = spans(length, size, overlap)
    total = torch.zeros(length)
    for span in placed:
        assert (span.shares > 0).all()
        total[span.start : span.stop] += span.shares
    assert_close_relative(total, torch.ones(length), roundings=ONE_KERNEL)
    assert (placed[0].start, placed[-1].stop) == (0, length)
    assert {span.stop - span.start for span in placed} == {min(length, size)}
    assert all(one.stop - other.start >= overlap for one, other in pairwise(placed))


def test_the_last_tile_is_moved_back_and_no_tile_is_repeated() -> None:
    assert [(span.start, span.stop) for span in spans(4096, 512, 64)] == [
        *((start, start + 512) for start in range(0, 3584, 448)),
        (3584, 4096),
    ]
    assert [span.start for span in spans(1024, 512, 64)] == [0, 448, 512]
    assert [span.start for span in spans(512, 512, 64)] == [0]


def test_neighbours_fade_into_each_other_and_the_border_does_not() -> None:
    one, other = spans(12, 8, 4)
    ramp = torch.tensor([0.125, 0.375, 0.625, 0.875])
    assert torch.equal(one.shares, torch.cat((torch.ones(4), ramp.flip(0))))
    assert torch.equal(other.shares, torch.cat((ramp, torch.ones(4))))


def test_an_overlap_of_more_than_half_a_tile_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match=r"tile_overlap: 264 px is more than half of tile_size \(512 px\)"):
        Tiling(512, 264)


# Pixels


@pytest.mark.parametrize("size", [(40, 40), (18, 44), (16, 33)])
def test_a_constant_stays_a_constant_to_the_last_pixel(size: tuple[int, int]) -> None:
    """With a decoder that ignores borders, any trace of a tile would show here."""
    codec = VaeCodec(Enlarging(), CPU, torch.float32)
    pixels = decoded(codec, torch.full((16, *size), 0.5), tiled=True)
    assert pixels.shape == (size[0] * 8, size[1] * 8, 3)
    assert set(pixels.ravel()) == {round((0.5 / 2 + 0.5) * 255)}


@pytest.mark.parametrize("size", [(384, 384), (208, 336)])
def test_tiles_give_nearly_the_same_image_as_one_piece(codec: VaeCodec, size: tuple[int, int]) -> None:
    latents = encoded(codec, rendered(*size), tiled=False)
    whole, tiled = decoded(codec, latents, tiled=False), decoded(codec, latents, tiled=True)
    assert psnr(whole, tiled) > 33
    # The outermost pixels are no worse than the others.
    frame = np.ones(whole.shape[:2], dtype=bool)
    frame[1:-1, 1:-1] = False
    assert psnr(whole[frame], tiled[frame]) > 30


def test_tiles_encode_nearly_as_one_piece(codec: VaeCodec) -> None:
    image = rendered(384, 256)
    whole, tiled = encoded(codec, image, tiled=False), encoded(codec, image, tiled=True)
    assert whole.shape == tiled.shape == (16, 32, 48)
    assert not torch.equal(whole, tiled)
    truth = np.asarray(image).astype(float)
    assert psnr(decoded(codec, tiled, tiled=False), truth) > psnr(decoded(codec, whole, tiled=False), truth) - 3


def test_an_image_of_one_tile_equals_that_of_one_piece(codec: VaeCodec) -> None:
    image = rendered(128, 96)
    latents = encoded(codec, image, tiled=True)
    assert torch.equal(latents, encoded(codec, image, tiled=False))
    assert np.array_equal(decoded(codec, latents, tiled=True), decoded(codec, latents, tiled=False))


# Use of tiles


def test_an_image_that_would_not_fit_uses_tiles_automatically_and_records_it(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = in_small_tiles(demo_folder)
    whole, tiled = generated(pipeline, tiled=False), generated(pipeline, tiled=True)
    needed = 4 * 16 * 4 * 192 * 160  # tensors, channels, bytes, pixels
    monkeypatch.setattr(vae_module, "UNKNOWN_MEMORY_BYTES", needed)
    assert pixels(generated(pipeline, tiled=False)) == pixels(whole)
    monkeypatch.setattr(vae_module, "UNKNOWN_MEMORY_BYTES", needed - 1)
    automatic = generated(pipeline, tiled=False)
    assert pixels(automatic) == pixels(tiled)
    assert "vae_tiles" not in whole.made_by
    assert automatic.made_by["vae_tiles"] == tiled.made_by["vae_tiles"] == "128 px, overlapping by 32 px"


def test_the_decoder_never_processes_more_than_a_tile(vae: nn.Module) -> None:
    seen: list[torch.Size] = []
    codec = VaeCodec(Watched(vae, seen), CPU, torch.float32)
    decoded(codec, torch.randn(16, 50, 40), tiled=True)
    assert set(seen) == {torch.Size((1, 16, 16, 16))}


def test_a_request_for_tiles_uses_tiles(demo_folder: Path) -> None:
    pipeline = in_small_tiles(demo_folder)
    whole, tiled = generated(pipeline, tiled=False), generated(pipeline, tiled=True)
    assert pixels(whole) != pixels(tiled)
    assert pixels(generated(pipeline, tiled=False)) == pixels(whole)
    assert psnr(*(np.asarray(one.images[0].image).astype(float) for one in (whole, tiled))) > 25


def in_small_tiles(demo_folder: Path) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(
        demo_folder, torch_dtype="float32", dit_device="cpu", encoder_device="cpu", tile_size=128, tile_overlap=32
    )


def generated(pipeline: ZImagePipeline, tiled: bool) -> GenerationResult:
    request = GenerationRequest(
        prompt="sunset", image="given:a", strength=0.1, width=192, height=160, steps=1, tiled_vae=tiled
    )
    return pipeline.generate(request, inputs=Inputs(image=rendered(192, 160)))


def pixels(result: GenerationResult) -> bytes:
    return result.images[0].image.tobytes()


class Enlarging(nn.Module):
    """A stand-in for a VAE: each latent's first three channels become 8x8 pixels."""

    class config:
        scaling_factor = 1.0
        shift_factor = 0.0
        out_channels = 3
        block_out_channels = (16, 16)

    def decode(self, z: Tensor) -> Tensor:
        """Map (1, 16, h, w) to (1, 3, 8h, 8w)."""
        return nn.functional.interpolate(z[:, :3], scale_factor=8)


class Watched(nn.Module):
    """A VAE that records its inputs' shapes."""

    def __init__(self, vae: nn.Module, seen: list[torch.Size]) -> None:
        super().__init__()
        self.config = vae.config
        self._vae = vae
        self._seen = seen

    def decode(self, z: Tensor) -> Tensor:
        """Decode with the wrapped VAE."""
        self._seen.append(z.shape)
        return self._vae.decode(z)
