"""Rotary tables are those of diffusers, bit for bit, as real numbers; other frequencies give other tables."""

import pytest
import torch
from diffusers.models.transformers.transformer_z_image import RopeEmbedder

from zcore.imaging.model.rope import Rotary, caption_places, frequencies, picture_places, rotary, turn

CPU = torch.device("cpu")
PUBLISHED = (256.0, [32, 48, 48], [1536, 512, 512])
DEMO = (256.0, [8, 12, 12], [1536, 512, 512])


@pytest.mark.parametrize("layout", [PUBLISHED, DEMO])
def test_every_place_that_there_is_has_the_table_of_diffusers(layout: tuple[float, list[int], list[int]]) -> None:
    theta, dims, lengths = layout
    places = torch.stack([torch.arange(1536), torch.arange(1536) % 512, 511 - torch.arange(1536) % 512], 1)
    ours = rotary(places, frequencies(theta, dims), CPU)
    expected = RopeEmbedder(theta, dims, lengths)(places)
    assert ours.first.dtype == ours.second.dtype == torch.float32
    assert torch.equal(ours.first, torch.stack((expected.real, expected.imag), -1))
    assert torch.equal(ours.second, torch.stack((-expected.imag, expected.real), -1))


def test_a_caption_counts_through_its_padding_and_a_picture_stands_behind_it() -> None:
    assert caption_places(3).tolist() == [[1, 0, 0], [2, 0, 0], [3, 0, 0]]
    assert picture_places(33, 2, 3, 8).tolist() == [
        *([33, y, x] for y in range(2) for x in range(3)),
        [0, 0, 0],
        [0, 0, 0],
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turning_is_the_complex_product(dtype: torch.dtype) -> None:
    x = torch.randn(2, 50, 3, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    places = picture_places(33, 5, 10, 50)
    table = rotary(places, frequencies(256.0, DEMO[1]), CPU)
    turns = RopeEmbedder(*DEMO)(places)[None, :, None]
    expected = torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * turns).flatten(3)
    assert torch.equal(turn(x, table), expected.to(dtype))
    each = Rotary(table.first.expand(2, -1, -1, -1), table.second.expand(2, -1, -1, -1))
    assert torch.equal(turn(x, each), expected.to(dtype))


def test_frequencies_of_an_axis_may_be_others() -> None:
    places = picture_places(33, 4, 4, 16)
    plain = frequencies(256.0, DEMO[1])
    halved = rotary(places, [plain[0], plain[1] / 2, plain[2]], CPU)
    usual = rotary(places, plain, CPU)
    assert torch.equal(halved.first[:, :4], usual.first[:, :4])
    assert torch.equal(halved.first[:, 10:], usual.first[:, 10:])
    # The third row, at half the pace, is where the second was.
    assert torch.allclose(halved.first[8, 4:10], usual.first[4, 4:10], atol=1e-6)
