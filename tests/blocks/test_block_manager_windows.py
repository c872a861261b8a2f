"""Managers with a sliding window: never more than it can see, never less than a query can still see."""

from __future__ import annotations

import pytest
from helpers.block_contents import held, most_blocks, visible
from helpers.block_managers import reuse_order, run, tokens

from mlx_paged import BlockManager
from mlx_paged.blocks.block_manager import NO_BLOCK
from mlx_paged.blocks.free_lists import POLICIES


@pytest.mark.parametrize("allocator", sorted(POLICIES))
@pytest.mark.parametrize("block_size", [1, 2, 3, 5])
@pytest.mark.parametrize("window", [1, 2, 4, 5, 6, 20])
def test_a_sequence_holds_just_the_blocks_of_its_next_querys_window(
    window: int, block_size: int, allocator: str
) -> None:
    manager = BlockManager(40, block_size, window=window, allocator=allocator)
    manager.allocate(0, range(7))
    for end in range(7, 60):
        manager.mark_computed(0, end)
        table = manager.block_table(0)
        needed = {position // block_size for position in visible(window, end)} & set(range(len(table)))
        assert [i for i, block_id in enumerate(table) if block_id != NO_BLOCK] == sorted(needed)
        assert manager.num_blocks - manager.num_free_blocks == len(needed)
        manager.append(0, [end])
        assert len(held(manager, 0)) <= most_blocks(window, block_size)
        manager.check()
    manager.free(0)
    assert manager.num_free_blocks == 40


@pytest.mark.parametrize(
    "num_computed, expected",
    [
        (0, [0, 1, 2, 3]),
        (6, [0, 1, 2, 3]),
        (7, [-1, 1, 2, 3]),
        (9, [-1, 1, 2, 3]),
        (10, [-1, -1, 2, 3]),
        (12, [-1, -1, 2, 3]),
    ],
)
def test_blocks_that_no_further_query_sees_are_given_back(num_computed: int, expected: list[int]) -> None:
    # The query at position p sees p - 4 to p: after 7 tokens the next one sees 3 to 7, and block 0 ends at 2.
    manager = BlockManager(6, 3, window=5)
    manager.allocate("a", tokens(12))
    manager.mark_computed("a", num_computed)
    assert manager.block_table("a") == expected
    assert manager.num_free_blocks == 2 + expected.count(NO_BLOCK)
    assert manager.num_kv_tokens() == 12 - 3 * expected.count(NO_BLOCK)
    manager.check()
    if expected[0] == NO_BLOCK:
        with pytest.raises(IndexError):
            manager.slot("a", 0)
    manager.free("a")
    assert manager.num_free_blocks == 6


def test_a_windowed_sequence_is_hit_as_long_as_the_blocks_that_are_seen_are_there() -> None:
    manager = BlockManager(8, 2, window=3)
    run(manager, "a", tokens(9))
    assert manager.block_table("a") == [-1, -1, -1, 3, 4]
    assert manager.num_cached_tokens(tokens(9)) == 8
    assert manager.allocate("b", tokens(9)) == 8
    assert manager.block_table("b")[:4] == [-1, -1, -1, 3]
    manager.check()


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_of_chunks_a_sequence_holds_the_one_that_its_next_query_lies_in(block_size: int) -> None:
    manager = BlockManager(40, block_size, window=8, chunked=True)
    manager.allocate(0, range(5))
    for end in range(5, 40):
        manager.mark_computed(0, end)
        first = end // 8 * 8 // block_size
        assert [i for i, block_id in enumerate(manager.block_table(0)) if block_id != NO_BLOCK] == list(
            range(first, -(-end // block_size))
        )
        manager.append(0, [end])
        manager.check()


def test_a_chunked_sequence_is_hit_up_to_a_boundary_whatever_became_of_the_chunks_before() -> None:
    manager = BlockManager(4, 2, window=4, chunked=True)
    run(manager, "a", tokens(7))
    manager.free("a")
    assert manager.num_cached_tokens(tokens(7)) == 6
    manager.allocate("b", [90, 91, 92])  # takes the block of 2 that is left, and the oldest of the cached ones
    assert manager.num_cached_tokens(tokens(7)) == 6
    assert manager.allocate("c", tokens(7)) == 6
    assert manager.block_table("c")[:2] == [NO_BLOCK] * 2
    manager.check()


def test_a_window_of_less_than_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        BlockManager(4, 2, window=0)


def test_a_window_of_one_holds_nothing_between_two_blocks() -> None:
    manager = BlockManager(2, 2, window=1)
    manager.allocate(0, [1, 2])
    manager.mark_computed(0, 2)
    assert manager.block_table(0) == [NO_BLOCK]
    assert manager.num_kv_tokens() == 0
    assert manager.append(0, [3]) == []
    assert len(held(manager, 0)) == 1


def test_a_token_that_fell_out_of_the_window_has_no_slot() -> None:
    manager = BlockManager(4, 2, window=3)
    manager.allocate(0, range(6))
    manager.mark_computed(0, 6)
    assert manager.block_table(0)[:2] == [NO_BLOCK] * 2
    with pytest.raises(IndexError, match="from 4 on in blocks: no 3"):
        manager.slot(0, 3)
    assert manager.slot(0, 4) == (manager.block_table(0)[2], 0)


def test_a_block_that_one_of_two_forks_has_left_behind_stays_for_the_other() -> None:
    manager = BlockManager(8, 2, window=2, prefix_caching=False)
    manager.allocate(0, range(3))
    manager.fork(0, 1)
    first, _ = manager.block_table(1)
    manager.mark_computed(0, 3)
    assert manager.block_table(0)[0] == NO_BLOCK
    assert manager.ref_count(first) == 1
    manager.mark_computed(1, 3)
    assert manager.ref_count(first) == 0


def test_a_hit_needs_the_windows_blocks_only() -> None:
    manager = BlockManager(9, 2, window=3)
    manager.allocate(0, range(8))
    manager.mark_computed(0, 8)
    tail = manager.block_table(0)[-1]
    manager.fork(0, "keeper")  # holds the window's last block while everything else is overwritten
    manager.free(0)
    manager.allocate("others", range(100, 116))
    assert [block_id for block_id in range(9) if manager.is_cached(block_id)] == [tail]
    manager.free("others")
    assert manager.allocate(1, [*range(8), 9]) == 8
    assert manager.block_table(1)[:4] == [NO_BLOCK] * 3 + [tail]
    manager.check()


def test_compaction_keeps_what_was_given_back_given_back() -> None:
    manager = BlockManager(10, 2, window=3)
    manager.allocate(0, range(10))
    manager.allocate(1, range(50, 56))
    manager.mark_computed(0, 10)
    manager.mark_computed(1, 6)
    before = {seq_id: manager.block_table(seq_id) for seq_id in (0, 1)}
    moved = dict(enumerate(range(10)))
    for src, dst in manager.compact():
        moved |= {block: dst for block, at in list(moved.items()) if at == src}
    for seq_id, table in before.items():
        assert manager.block_table(seq_id) == [b if b == NO_BLOCK else moved[b] for b in table]
    assert sorted(held(manager, 0) + held(manager, 1)) == [0, 1]
    manager.check()


def test_blocks_that_fall_out_of_the_window_together_are_reused_from_the_last_one_on() -> None:
    manager = BlockManager(8, 2, window=3)
    manager.allocate("a", tokens(8))
    manager.mark_computed("a", 8)
    assert reuse_order(manager) == [4, 5, 6, 7, 2, 1, 0]
