"""Drafts by lookup: what followed the longest n-gram that the tokens end with, where it was last."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from helpers.budget import budget
from hypothesis import given, settings

from mlx_paged.speculation.ngram import NgramLookup


def by_search(tokens: list[int], longest: int, shortest: int, most: int) -> list[int]:
    """The same without an index."""
    for length in range(longest, shortest - 1, -1):
        if length > len(tokens):
            continue
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[-length:]:
                period, draft = len(tokens) - end, list[int]()
                for i in range(most):
                    draft.append(tokens[end + i] if i < period else draft[i - period])
                return draft
    return []


@settings(max_examples=budget(150, 10_000), deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 4), st.integers(0, 3), st.data())
def test_it_finds_what_a_search_finds(tokens: list[int], shortest: int, more: int, data: st.DataObject) -> None:
    lookup, longest = NgramLookup(shortest + more, shortest), shortest + more
    known = 0
    while known < len(tokens):
        foretold = [by_search(tokens[:end], longest, shortest, 1) == [tokens[end]] for end in range(known, len(tokens))]
        known_before, known = known, data.draw(st.integers(known + 1, len(tokens)))
        expected = sum(foretold[: known - known_before]) if known_before else 0
        assert lookup.update(tokens[:known]) == (expected, known - known_before)
        assert lookup.propose(tokens[:known], 7) == by_search(tokens[:known], longest, shortest, 7)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], [3, 4, 1]),
        ([5, 5, 5], [5, 5, 5]),
        ([1, 2, 9, 1, 2, 8, 1, 2], [8, 1, 2]),
        ([1, 2, 3], []),
        ([7], []),
    ],
)
def test_what_repeats_itself_goes_on_and_what_is_new_has_no_draft(tokens: list[int], expected: list[int]) -> None:
    lookup = NgramLookup(3, 2)
    lookup.update(tokens)
    assert lookup.propose(tokens, 3) == expected
