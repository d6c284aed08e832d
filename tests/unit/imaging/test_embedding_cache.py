"""The cache retains the most recently used embeddings within its limit, and never mixes up two of them."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from zcore.imaging.text.embedding_cache import CacheStatistics, EmbeddingCache, key_of

ROW_BYTES = 16


def embedding(rows: int) -> torch.Tensor:
    return torch.full((rows, 8), float(rows), dtype=torch.bfloat16)


def test_a_stored_embedding_is_returned_and_counted() -> None:
    cache = EmbeddingCache(10 * ROW_BYTES)
    assert cache.get("a") is None
    cache.put("a", embedding(3))
    found = cache.get("a")
    assert found is not None
    assert torch.equal(found, embedding(3))
    assert cache.statistics() == CacheStatistics(hits=1, misses=1, entries=1, held_bytes=3 * ROW_BYTES)


def test_the_least_recently_used_embedding_is_dropped_first() -> None:
    cache = EmbeddingCache(6 * ROW_BYTES)
    for key in ("a", "b", "c"):
        cache.put(key, embedding(2))
    cache.get("a")
    cache.put("d", embedding(2))
    assert [key for key in "abcd" if cache.get(key) is not None] == ["a", "c", "d"]


def test_an_embedding_larger_than_the_limit_is_not_stored_and_drops_nothing() -> None:
    cache = EmbeddingCache(2 * ROW_BYTES)
    cache.put("a", embedding(2))
    cache.put("b", embedding(3))
    assert cache.get("a") is not None
    assert cache.get("b") is None


def test_a_limit_of_zero_disables_the_cache() -> None:
    cache = EmbeddingCache(0)
    cache.put("a", embedding(1))
    assert cache.statistics().entries == 0


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 12)), max_size=40), st.integers(0, 20))
def test_the_bytes_held_are_those_of_the_entries_and_within_the_limit(
    puts: list[tuple[str, int]], limit_rows: int
) -> None:
    cache = EmbeddingCache(limit_rows * ROW_BYTES)
    for key, rows in puts:
        cache.put(key, embedding(rows))
        held = [found for key in "abcdef" if (found := cache.get(key)) is not None]
        assert cache.statistics().held_bytes == sum(one.nbytes for one in held) <= limit_rows * ROW_BYTES
        assert cache.statistics().entries == len(held)
        if rows <= limit_rows:
            latest = cache.get(key)
            assert latest is not None
            assert torch.equal(latest, embedding(rows))


def test_a_key_depends_on_everything_that_determines_an_embedding() -> None:
    keys = {
        key_of([1, 23], "r"),
        key_of([12, 3], "r"),
        key_of([1, 23], "r", "-2"),
        key_of([1, 23], "r-2"),
        key_of([1, 23], "s"),
        key_of([], "r"),
    }
    assert len(keys) == 6
    assert key_of([1, 23], "r") in keys
