"""Values of every kind, to be given where something of one kind is expected."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st

_TEXT = st.text(st.one_of(st.characters(exclude_categories=()), st.sampled_from("\ud800\udfff\ufeff\x00")), max_size=6)
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 120),
    st.sampled_from([2**31 - 1, 2**31, 2**32, 2**63, 2**64, -(2**31) - 1, -(2**70), 10**400]),
    st.builds(pow, st.just(-10), st.just(5001)),  # has more digits than Python writes
    st.floats(),
    st.sampled_from([0.5, 1.0, 1e-300, 1e300, math.nan, math.inf]),
    st.complex_numbers(),
    st.sampled_from([np.int8(3), np.int64(2), np.uint64(2**64 - 1), np.float16(0.5), np.float32(1), np.float64("nan")]),
    st.sampled_from([np.bool_(True), np.array(3), np.array([1, 2]), np.array([[1], [2]]), np.array([]), np.array(0.5)]),
    _TEXT,
    st.binary(max_size=4),
    st.builds(bytearray, st.binary(max_size=4)),
    st.builds(object),
)


def _collections(each: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists = st.lists(each, max_size=4)
    hashable = st.one_of(st.none(), st.booleans(), st.integers(-1, 120), st.floats(), _TEXT)
    return st.one_of(
        lists,
        lists.map(tuple),
        lists.map(iter),
        st.builds(range, st.integers(-1, 4)),
        st.dictionaries(hashable, each, max_size=3),
        st.sets(hashable, max_size=3),
    )


anything = st.recursive(_SCALARS, _collections, max_leaves=5)
"""Numbers of all sizes and libraries, text with lone surrogates, bytes, what can be read once, and the like."""
