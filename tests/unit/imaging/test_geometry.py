"""Sizes follow from each other, and the model's limits from its position tables."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zcore.checkpoint.geometry import LatentSize, PlacementLimits, check_sides, image_tokens, latent_size, padded
from zcore.errors import InvalidRequest

SIDES = st.integers(1, 512).map(lambda patches: patches * 16)


def test_eight_pixels_make_a_latent_and_sixteen_a_token() -> None:
    assert latent_size(width_px=1024, height_px=768) == LatentSize(height=96, width=128)
    assert image_tokens(1024, 1024) == 4096
    assert image_tokens(16, 16) == 1


@given(SIDES, SIDES)
def test_a_token_covers_256_pixels(width: int, height: int) -> None:
    assert image_tokens(width, height) * 256 == width * height


@pytest.mark.parametrize(("tokens", "length"), [(1, 32), (32, 32), (33, 64), (1504, 1504), (1505, 1536)])
def test_sequences_are_padded_to_multiples_of_32(tokens: int, length: int) -> None:
    assert padded(tokens) == length


def test_the_published_model_supports_1504_tokens_and_8192_pixels() -> None:
    limits = PlacementLimits(1536, 512, 512)
    assert limits.caption_tokens == 1504
    assert (limits.width_px, limits.height_px) == (8192, 8192)


@given(st.integers(34, 5000))
def test_the_longest_caption_leaves_a_frame_for_its_image_and_one_more_would_not(rows: int) -> None:
    limit = PlacementLimits(frames=rows).caption_tokens
    assert padded(limit) + 1 <= rows - 1
    assert padded(limit + 1) + 1 > rows - 1


@pytest.mark.parametrize(("width", "height", "field"), [(80, 64, "width"), (64, 144, "height")])
def test_a_side_beyond_the_tables_is_refused_by_name(width: int, height: int, field: str) -> None:
    limits = PlacementLimits(rows=8, columns=4)
    check_sides(64, 128, limits)
    with pytest.raises(InvalidRequest, match=f"^{field}: ") as refusal:
        check_sides(width, height, limits)
    assert [error.pointer for error in refusal.value.errors] == [f"/{field}"]
