"""Requests and their sequences."""

from __future__ import annotations

import pytest

from mlx_paged.request import common_prefix_len


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2, 3], [1, 9, 3], [1, 2, 4]], 1), ([[1], [2]], 0), ([[1, 2, 3]] * 2, 2)],
)
def test_what_lists_have_in_common_ends_before_the_last_token(token_ids: list[list[int]], expected: int) -> None:
    assert common_prefix_len(token_ids) == expected
