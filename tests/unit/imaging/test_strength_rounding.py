"""The number of forwards for a strength is that of exact arithmetic, not of products that binary fractions round up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zcore.imaging.sampling.schedule import sigmas


@pytest.mark.parametrize(("steps", "strength", "forwards"), [(50, 0.14, 7), (100, 0.07, 7), (25, 0.28, 7), (9, 1.0, 9)])
def test_a_product_that_is_whole_takes_that_many_forwards(steps: int, strength: float, forwards: int) -> None:
    assert len(sigmas(steps, 3.0, strength)) - 1 == forwards


@given(st.integers(1, 100), st.integers(1, 1000))
def test_any_other_product_is_rounded_up(steps: int, thousandths: int) -> None:
    exact = -(-steps * thousandths // 1000)
    assert len(sigmas(steps, 3.0, thousandths / 1000)) - 1 == exact
