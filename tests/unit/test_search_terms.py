"""Terms: every text is found by its own words, and no term can be mistaken for one of another kind."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zcore.jobs.search_terms import job_terms, parse_query

TEXTS = st.text(max_size=300) | st.text(alphabet="aA1 ='\"\\&|!*:()<>-_森の🦊ßİé\u0301\u200d", max_size=80)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@given(TEXTS, st.text(min_size=1, max_size=20))
def test_a_prompt_is_found_by_its_own_text(prompt: str, owner: str) -> None:
    terms = job_terms(prompt, {}, owner)
    for word in parse_query(prompt, owner):
        assert any(term.startswith(word.text) if word.is_beginning else term == word.text for term in terms)


@given(TEXTS, st.dictionaries(TEXTS, VALUES, max_size=3), st.text(min_size=1, max_size=20))
def test_terms_are_of_three_kinds_and_fit_both_indexes(prompt: str, metadata: dict[str, Any], owner: str) -> None:
    terms = job_terms(prompt, metadata, owner)
    assert [term for term in terms if term.startswith("@")] == job_terms("", {}, owner)
    for term in terms:
        assert 0 < len(term) <= 200
        assert not re.search(r'["\s\x00-\x1f\x7f]', term)
        assert term[0] in "@=" or not re.search(r"[=@]", term)


@given(TEXTS)
def test_no_text_looks_for_an_owner(text: str) -> None:
    assert not [word for word in parse_query(text) if word.text.startswith("@")]


@pytest.mark.parametrize("depth", [1, 250])
def test_metadata_may_be_nested_deeply(depth: int) -> None:
    nested: Any = 7
    for _ in range(depth):
        nested = {"a": nested}
    assert "7" in job_terms("", nested, "anna")


def test_of_many_words_only_the_last_is_a_beginning() -> None:
    assert [word.is_beginning for word in parse_query("a b c d e f g h")] == [True] * 8
    assert [word.is_beginning for word in parse_query("a b c d e f g h i")] == [False] * 8 + [True]
