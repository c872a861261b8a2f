"""Which sequences share their first blocks, and how to save the most reads by it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mlx_paged.attention.shared_prefix import SharedPrefix, find_shared_prefixes


def found(tables: list[list[int]], context_lens: list[int], block_size: int) -> list[tuple[list[int], int]]:
    width = max([1, *map(len, tables)])
    padded = np.array([table + [-1] * (width - len(table)) for table in tables], np.int32).reshape(len(tables), width)
    prefixes = find_shared_prefixes(padded, np.array(context_lens, np.int32), block_size)
    return sorted((prefix.members.tolist(), prefix.num_tokens) for prefix in prefixes)


def test_beams_share_the_blocks_of_their_prompt() -> None:
    assert found([[5, 6, 7], [5, 6, 8], [5, 6, 9]], [10, 11, 9], 4) == [([0, 1, 2], 8)]


def test_only_whole_blocks_before_the_last_token_are_shared() -> None:
    assert found([[5, 6], [5, 6]], [8, 8], 4) == [([0, 1], 4)]
    assert found([[5, 6], [5, 6]], [9, 8], 4) == [([0, 1], 4)]
    assert found([[5, 6], [5, 6]], [4, 3], 4) == []


def test_later_blocks_that_happen_to_be_the_same_are_not_a_prefix() -> None:
    assert found([[1, 5, 6], [2, 5, 6]], [12, 12], 4) == []


def test_two_conversations_with_one_system_prompt_are_read_by_what_saves_more() -> None:
    system, one, other = [1], [2, 3, 4, 5], [6, 7, 8, 9]
    tables = [[*system, *one], [*system, *one], [*system, *other], [*system, *other], [*system, 10]]
    assert found(tables, [21, 21, 21, 21, 6], 4) == [([0, 1], 20), ([2, 3], 20)]
    tables = [[1, 2, 3, 4, 10 + i] for i in range(6)] + [[1, 2, 3, 4, 5, 30], [1, 2, 3, 4, 5, 31]]
    assert found(tables, [17] * 6 + [22] * 2, 4) == [(list(range(8)), 16)]


def test_what_a_group_leaves_out_joins_one_with_a_shorter_prefix() -> None:
    tables = [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2], [1]]
    assert found(tables, [13, 13, 7, 4], 3) == [([0, 1], 12), ([2, 3], 3)]


def test_no_sequences_share_nothing() -> None:
    assert found([], [], 16) == []
    assert found([[]], [0], 16) == []


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for i, group in enumerate(rest):
            yield [*rest[:i], [items[0], *group], *rest[i + 1 :]]


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=7), min_size=1, max_size=6),
    st.data(),
)
def test_no_other_way_to_group_the_sequences_saves_more(branches: list[list[int]], data: st.DataObject) -> None:
    """Sequences are paths in a binary tree of blocks, so that they share trunks and branches of all lengths."""
    blocks: dict[tuple[int, ...], int] = {}
    tables = [[blocks.setdefault(tuple(path[: i + 1]), len(blocks)) for i in range(len(path))] for path in branches]
    contexts = [data.draw(st.integers(0, 3 * len(table))) for table in tables]
    shareable = [tuple(table[: max(0, context - 1) // 3]) for table, context in zip(tables, contexts, strict=True)]

    def saved(group: list[int]) -> int:
        length = 0
        while len({shareable[i][: length + 1] for i in group}) == 1 and len(shareable[group[0]]) > length:
            length += 1
        return (len(group) - 1) * length * 3

    groups = found(tables, contexts, 3)
    for members, num_tokens in groups:
        assert len({shareable[i][: num_tokens // 3] for i in members}) == 1 and num_tokens % 3 == 0
        assert all(len(shareable[i]) * 3 >= num_tokens for i in members)
    members = [i for group, _ in groups for i in group]
    assert len(members) == len(set(members))
    total = sum((len(group) - 1) * num_tokens for group, num_tokens in groups)
    assert total == max(sum(map(saved, partition)) for partition in partitions(list(range(len(tables)))))


def test_a_prefix_counts_the_reads_it_saves() -> None:
    assert SharedPrefix(np.array([1, 4, 5]), 64).num_saved == 128
