"""Embeddings over the limit are compressed by their mode, in every dtype, without changing the tail."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.numerics import ONE_KERNEL, assert_close_relative
from zcore.errors import PromptTooLong
from zcore.imaging.text.long_prompt import CompressionMode, compress

pytestmark = pytest.mark.numeric
MODES: tuple[CompressionMode, ...] = ("interpolate", "pool", "attention_pool")


def counting(n: int, width: int = 3) -> Tensor:
    """Row i consists of i."""
    return torch.arange(n, dtype=torch.float32)[:, None].repeat(1, width)


def noise(n: int, width: int = 8) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize(("mode", "rows"), [("interpolate", [0.0, 3.0, 6.0, 9.0]), ("pool", [1.0, 3.0, 6.0, 8.0])])
def test_ten_rows_become_four_by_the_published_numbers(mode: CompressionMode, rows: list[float]) -> None:
    assert_close_relative(compress(counting(10), 0, 4, mode)[:, 0], torch.tensor(rows), roundings=ONE_KERNEL)


def test_interpolation_is_linear_between_neighbours() -> None:
    embeds = noise(11)
    compressed = compress(embeds, 0, 6, "interpolate")
    assert_close_relative(compressed, embeds[::2], roundings=ONE_KERNEL)
    seven = compress(embeds, 0, 7, "interpolate")
    at = 2 * 10 / 6
    lower = int(at)
    between = embeds[lower] * (lower + 1 - at) + embeds[lower + 1] * (at - lower)
    assert_close_relative(seven[2], between, roundings=ONE_KERNEL)


def test_attention_pool_weights_rows_by_their_difference_from_their_neighbours() -> None:
    """Compare with the formula, row by row."""
    embeds = noise(9)
    units = [row / row.norm() for row in embeds]
    importance = []
    for i in range(9):
        near = [j for j in (i - 2, i - 1, i + 1, i + 2) if 0 <= j < 9]
        importance.append(1 - sum(float(units[i] @ units[j]) for j in near) / len(near))
    shifted = torch.tensor(importance) - min(importance) + 0.1
    expected = []
    for region in range(4):
        members = [i for i in range(9) if min(i * 4 // 9, 3) == region]
        weights = torch.softmax(shifted[members], 0)
        expected.append((embeds[members] * weights[:, None]).sum(0))
    assert_close_relative(compress(embeds, 0, 4, "attention_pool"), torch.stack(expected), roundings=3 * ONE_KERNEL)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_mode_works_in_every_dtype_and_keeps_it(mode: CompressionMode, dtype: torch.dtype) -> None:
    embeds = noise(2000, 16)
    compressed = compress(embeds.to(dtype), 5, 1504, mode)
    assert compressed.dtype == dtype
    assert compressed.shape == (1504, 16)
    exact = compress(embeds.to(dtype).float(), 5, 1504, mode)
    assert torch.equal(compressed, exact.to(dtype))


@given(st.sampled_from(MODES), st.integers(1, 60), st.integers(2, 40), st.integers(0, 10))
def test_the_tail_is_never_touched_and_the_limit_is_respected(
    mode: CompressionMode, n: int, limit: int, tail: int
) -> None:
    embeds = noise(n)
    tail = min(tail, n)
    if n <= limit:
        assert compress(embeds, tail, limit, mode) is embeds
    elif tail >= limit:
        with pytest.raises(PromptTooLong, match=f"{tail} tokens of template and chat format; at most {limit}"):
            compress(embeds, tail, limit, mode)
    else:
        compressed = compress(embeds, tail, limit, mode)
        assert compressed.shape[0] == limit
        assert torch.equal(compressed[limit - tail :], embeds[n - tail :])


@pytest.mark.parametrize("mode", MODES)
def test_equal_rows_stay_what_they_are(mode: CompressionMode) -> None:
    row = noise(1)
    assert_close_relative(compress(row.repeat(50, 1), 4, 20, mode), row.repeat(20, 1), roundings=ONE_KERNEL)
