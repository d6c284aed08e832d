"""Rotary tables equal those of diffusers, bit for bit, in real numbers; other frequencies give other tables."""

import pytest
import torch
from diffusers.models.transformers.transformer_z_image import RopeEmbedder

from tests.numerics import assert_close_relative
from zcore.imaging.network.rope import Rotary, apply_rotary, caption_positions, frequencies, image_positions, rotary

CPU = torch.device("cpu")
PUBLISHED = (256.0, [32, 48, 48], [1536, 512, 512])
DEMO = (256.0, [8, 12, 12], [1536, 512, 512])


@pytest.mark.numeric
@pytest.mark.parametrize("layout", [PUBLISHED, DEMO])
def test_every_position_has_the_table_of_diffusers(layout: tuple[float, list[int], list[int]]) -> None:
    theta, dims, lengths = layout
    positions = torch.stack([torch.arange(1536), torch.arange(1536) % 512, 511 - torch.arange(1536) % 512], 1)
    ours = rotary(positions, frequencies(theta, dims), CPU)
    expected = RopeEmbedder(theta, dims, lengths)(positions)
    assert ours.first.dtype == ours.second.dtype == torch.float32
    assert torch.equal(ours.first, torch.stack((expected.real, expected.imag), -1))
    assert torch.equal(ours.second, torch.stack((-expected.imag, expected.real), -1))


def test_caption_positions_include_the_padding_and_the_image_follows() -> None:
    assert caption_positions(3).tolist() == [[1, 0, 0], [2, 0, 0], [3, 0, 0]]
    assert image_positions(33, 2, 3, 8).tolist() == [
        *([33, y, x] for y in range(2) for x in range(3)),
        [0, 0, 0],
        [0, 0, 0],
    ]


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_the_complex_product(dtype: torch.dtype) -> None:
    x = torch.randn(2, 50, 3, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    positions = image_positions(33, 5, 10, 50)
    table = rotary(positions, frequencies(256.0, DEMO[1]), CPU)
    factors = RopeEmbedder(*DEMO)(positions)[None, :, None]
    expected = torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * factors).flatten(3)
    assert torch.equal(apply_rotary(x, table), expected.to(dtype))
    each = Rotary(table.first.expand(2, -1, -1, -1), table.second.expand(2, -1, -1, -1))
    assert torch.equal(apply_rotary(x, each), expected.to(dtype))


@pytest.mark.numeric
def test_an_axis_may_have_other_frequencies() -> None:
    positions = image_positions(33, 4, 4, 16)
    plain = frequencies(256.0, DEMO[1])
    halved = rotary(positions, [plain[0], plain[1] / 2, plain[2]], CPU)
    usual = rotary(positions, plain, CPU)
    assert torch.equal(halved.first[:, :4], usual.first[:, :4])
    assert torch.equal(halved.first[:, 10:], usual.first[:, 10:])
    # With half the frequency, the third row equals the second.
    assert_close_relative(halved.first[8, 4:10], usual.first[4, 4:10], roundings=2)
