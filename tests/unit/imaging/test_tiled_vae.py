"""Large pictures go through the VAE in tiles: without seams or frames, and close to what one piece gives."""

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

from zcore.demo.render import render
from zcore.demo.vocabulary import Picture, Thing
from zcore.errors import CheckpointError
from zcore.imaging.model import vae as vae_module
from zcore.imaging.model.loader import Placement, load_vae
from zcore.imaging.model.tiling import Tiling, spans
from zcore.imaging.model.vae import PictureCoder
from zcore.imaging.pipeline import GenerationResult, Inputs, ZImagePipeline
from zcore.request import GenerationRequest

CPU = torch.device("cpu")
TILING = Tiling(size_px=128, overlap_px=32)


@pytest.fixture(scope="module")
def vae(demo_folder: Path) -> nn.Module:
    return load_vae(demo_folder, Placement(CPU, torch.float32))


@pytest.fixture(scope="module")
def coder(vae: nn.Module) -> PictureCoder:
    return PictureCoder(vae, CPU, torch.float32)


def rendered(width: int, height: int) -> Image.Image:
    return Image.fromarray(
        render(Picture("center", (Thing("star", "red"),), "light blue"), width, height, random.Random(3))
    )


def encoded(coder: PictureCoder, image: Image.Image, tiled: bool) -> Tensor:
    with torch.inference_mode():
        return coder.draw(coder.encode(image, TILING if tiled else None), torch.Generator().manual_seed(5))


def decoded(coder: PictureCoder, latents: Tensor, tiled: bool) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(coder.decode(latents, TILING if tiled else None)).astype(float)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * log10(255**2 / float(np.square(one - other).mean()))


# Where tiles lie


@given(st.integers(1, 700), st.integers(2, 200), st.data())
def test_tiles_reach_everywhere_and_their_shares_are_one_in_all(length: int, size: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, size // 2))
    placed = spans(length, size, overlap)
    total = torch.zeros(length)
    for span in placed:
        assert (span.shares > 0).all()
        total[span.start : span.stop] += span.shares
    assert torch.allclose(total, torch.ones(length))
    assert (placed[0].start, placed[-1].stop) == (0, length)
    assert {span.stop - span.start for span in placed} == {min(length, size)}
    assert all(one.stop - other.start >= overlap for one, other in pairwise(placed))


def test_the_last_tile_is_moved_back_and_no_tile_lies_twice() -> None:
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
    with pytest.raises(CheckpointError, match="tile_overlap: 264 px is more than half of tile_size, 512 px"):
        Tiling(512, 264)


# Pixels


@pytest.mark.parametrize("size", [(40, 40), (18, 44), (16, 33)])
def test_a_constant_stays_a_constant_to_the_last_pixel(size: tuple[int, int]) -> None:
    """With a decoder that knows no border, whatever shows a tile would show here."""
    coder = PictureCoder(Enlarging(), CPU, torch.float32)
    painted = decoded(coder, torch.full((16, *size), 0.5), tiled=True)
    assert painted.shape == (size[0] * 8, size[1] * 8, 3)
    assert set(painted.ravel()) == {round((0.5 / 2 + 0.5) * 255)}


@pytest.mark.parametrize("size", [(384, 384), (208, 336)])
def test_tiles_give_nearly_the_picture_of_one_piece(coder: PictureCoder, size: tuple[int, int]) -> None:
    latents = encoded(coder, rendered(*size), tiled=False)
    whole, tiled = decoded(coder, latents, tiled=False), decoded(coder, latents, tiled=True)
    assert psnr(whole, tiled) > 33
    # The frame of the picture is no worse than the rest of it.
    frame = np.ones(whole.shape[:2], dtype=bool)
    frame[1:-1, 1:-1] = False
    assert psnr(whole[frame], tiled[frame]) > 30


def test_tiles_encode_nearly_as_one_piece(coder: PictureCoder) -> None:
    image = rendered(384, 256)
    whole, tiled = encoded(coder, image, tiled=False), encoded(coder, image, tiled=True)
    assert whole.shape == tiled.shape == (16, 32, 48)
    assert not torch.equal(whole, tiled)
    truth = np.asarray(image).astype(float)
    assert psnr(decoded(coder, tiled, tiled=False), truth) > psnr(decoded(coder, whole, tiled=False), truth) - 3


def test_a_picture_of_one_tile_is_that_of_one_piece(coder: PictureCoder) -> None:
    image = rendered(128, 96)
    latents = encoded(coder, image, tiled=True)
    assert torch.equal(latents, encoded(coder, image, tiled=False))
    assert np.array_equal(decoded(coder, latents, tiled=True), decoded(coder, latents, tiled=False))


# When


def test_what_would_not_fit_goes_in_tiles_unasked_and_its_file_says_so(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = in_small_tiles(demo_folder)
    whole, tiled = painted(pipeline, tiled=False), painted(pipeline, tiled=True)
    needed = 4 * 16 * 4 * 192 * 160  # tensors, channels, bytes, pixels
    monkeypatch.setattr(vae_module, "UNTOLD_MEMORY_BYTES", needed)
    assert pixels(painted(pipeline, tiled=False)) == pixels(whole)
    monkeypatch.setattr(vae_module, "UNTOLD_MEMORY_BYTES", needed - 1)
    unasked = painted(pipeline, tiled=False)
    assert pixels(unasked) == pixels(tiled)
    assert "vae_tiles" not in whole.made_by
    assert unasked.made_by["vae_tiles"] == tiled.made_by["vae_tiles"] == "128 px, overlapping by 32 px"


def test_the_decoder_never_sees_more_than_a_tile(vae: nn.Module) -> None:
    seen: list[torch.Size] = []
    coder = PictureCoder(Watched(vae, seen), CPU, torch.float32)
    decoded(coder, torch.randn(16, 50, 40), tiled=True)
    assert set(seen) == {torch.Size((1, 16, 16, 16))}


def test_a_request_for_tiles_is_painted_in_tiles(demo_folder: Path) -> None:
    pipeline = in_small_tiles(demo_folder)
    whole, tiled = painted(pipeline, tiled=False), painted(pipeline, tiled=True)
    assert pixels(whole) != pixels(tiled)
    assert pixels(painted(pipeline, tiled=False)) == pixels(whole)
    assert psnr(*(np.asarray(one.images[0].image).astype(float) for one in (whole, tiled))) > 25


def in_small_tiles(demo_folder: Path) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(
        demo_folder, torch_dtype="float32", dit_device="cpu", encoder_device="cpu", tile_size=128, tile_overlap=32
    )


def painted(pipeline: ZImagePipeline, tiled: bool) -> GenerationResult:
    request = GenerationRequest(
        prompt="sunset", image="given:a", strength=0.1, width=192, height=160, steps=1, tiled_vae=tiled
    )
    return pipeline.generate(request, inputs=Inputs(image=rendered(192, 160)))


def pixels(result: GenerationResult) -> bytes:
    return result.images[0].image.tobytes()


class Enlarging(nn.Module):
    """In place of a VAE: each latent's first three channels become 8x8 pixels."""

    class config:
        scaling_factor = 1.0
        shift_factor = 0.0
        out_channels = 3
        block_out_channels = (16, 16)

    def decode(self, z: Tensor, return_dict: bool) -> tuple[Tensor]:
        """(1, 16, h, w) to (1, 3, 8h, 8w)."""
        return (nn.functional.interpolate(z[:, :3], scale_factor=8),)


class Watched(nn.Module):
    """A VAE that says what it was given."""

    def __init__(self, vae: nn.Module, seen: list[torch.Size]) -> None:
        super().__init__()
        self.config = vae.config
        self._vae = vae
        self._seen = seen

    def decode(self, z: Tensor, return_dict: bool) -> tuple[Tensor]:
        """As the VAE does."""
        self._seen.append(z.shape)
        return self._vae.decode(z, return_dict=return_dict)  # type: ignore[operator]
