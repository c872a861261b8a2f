"""Compaction: which blocks move where, and what stays cached."""

from __future__ import annotations

import pytest
from helpers.block_managers import fill, reuse_order, run, snapshot, tokens

from mlx_paged import BlockManager

both_policies = pytest.mark.parametrize("allocator", ["lru", "fifo"])


def test_compaction_moves_what_lies_high_into_the_holes_below() -> None:
    manager = BlockManager(8, 2, prefix_caching=False)
    fill(manager, {"a": 4, "b": 4, "c": 3})
    manager.free("a")
    assert manager.compact() == [(4, 0), (5, 1)]
    assert manager.block_table("b") == [2, 3]
    assert manager.block_table("c") == [0, 1]
    assert [manager.ref_count(block_id) for block_id in range(8)] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert manager.compact() == []
    manager.check()


@pytest.mark.parametrize("sizes", [{}, {"a": 4}, {"a": 4, "b": 12}])
def test_a_pool_without_holes_is_left_alone(sizes: dict[str, int]) -> None:
    manager = BlockManager(8, 2)
    fill(manager, sizes)
    before = snapshot(manager)
    assert manager.compact() == []
    assert snapshot(manager) == before


def test_a_shared_block_moves_once_for_all_its_tables() -> None:
    manager = BlockManager(6, 2, prefix_caching=False)
    fill(manager, {"a": 2, "b": 3})
    manager.fork("b", "c")
    manager.free("a")
    assert manager.compact() == [(2, 0)]
    assert manager.block_table("b") == manager.block_table("c") == [1, 0]
    assert manager.ref_count(0) == 2
    assert manager.append("c", [9]) == [(0, manager.block_table("c")[1])]
    manager.check()


@both_policies
def test_cached_blocks_move_out_of_the_way_and_are_still_hit(allocator: str) -> None:
    manager = BlockManager(7, 2, allocator=allocator)
    fill(manager, {"cached": 4, "live": 4})
    manager.free("cached")
    moves = manager.compact()
    contents = dict(enumerate("ABCD---"))  # what blocks 0 to 6 held
    for src, dst in moves:
        contents[dst] = contents[src]
    assert [contents[block_id] for block_id in manager.block_table("live")] == ["C", "D"]
    assert set(manager.block_table("live")) == {0, 1}
    assert manager.compact() == []
    assert manager.allocate("again", tokens(5)) == 4
    assert [contents[block_id] for block_id in manager.block_table("again")[:2]] == ["A", "B"]
    assert manager.allocate("live again", tokens(4, 100) + [7]) == 4
    manager.check()


@both_policies
def test_compacting_a_pool_without_an_empty_block_costs_one_cached_block(allocator: str) -> None:
    manager = BlockManager(5, 2, allocator=allocator)
    fill(manager, {"cached": 6, "live": 4})
    manager.free("cached")
    assert len(manager._tree._node_of_block) == 5
    moves = manager.compact()
    contents = dict(enumerate("ABCDE"))
    for src, dst in moves:
        contents[dst] = contents[src]
    assert [contents[block_id] for block_id in manager.block_table("live")] == ["D", "E"]
    assert set(manager.block_table("live")) == {0, 1}
    assert len(manager._tree._node_of_block) == 4
    left = [contents[node.block_id] for node in map(manager._tree._node_of_block.get, range(2, 5)) if node]
    assert len(left) == 2 and set(left) < set("ABC")
    if allocator == "lru":
        assert [manager.is_cached(block_id) for block_id in reuse_order(manager)] == [False, True, True]
    assert manager.compact() == []
    manager.check()


def test_moved_cached_blocks_keep_their_turn_in_the_order_of_reuse() -> None:
    manager = BlockManager(6, 2)
    fill(manager, {"old": 2, "live": 4, "new": 2})
    manager.free("old")
    manager.free("new")
    assert reuse_order(manager) == [4, 5, 0, 3]
    moves = manager.compact()
    where = {0: 0, 3: 3}
    for src, dst in moves:
        where |= {content: dst for content, at in where.items() if at == src}
    assert [block_id for block_id in reuse_order(manager) if block_id in where.values()] == [where[0], where[3]]


def test_sequences_grow_and_fork_on_after_compaction() -> None:
    manager = BlockManager(6, 2)
    fill(manager, {"a": 4, "b": 3})
    manager.free("a")
    manager.compact()
    manager.fork("b", "c")
    shared = manager.block_table("b")[-1]
    ((src, dst),) = manager.append("b", [7])
    assert src == shared and dst == manager.block_table("b")[-1] != shared
    manager.mark_computed("b", 4)
    assert manager.allocate("d", tokens(3, 100) + [7, 8]) == 4
    assert manager.block_table("d")[:2] == manager.block_table("b")
    manager.check()


def test_empty_blocks_are_filled_first_which_makes_room_for_cached_ones() -> None:
    manager = BlockManager(4, 2)
    run(manager, "cached", tokens(2))
    manager.allocate("empty", [99])
    for start in (50, 70):
        run(manager, str(start), tokens(2, start))
    manager.free("cached")
    manager.free("empty")
    manager.compact()
    assert [manager.block_table(str(start)) for start in (50, 70)] == [[1], [0]]
    assert manager.num_cached_tokens(tokens(3)) == 2
    manager.check()


@pytest.mark.parametrize(
    ("num_tokens", "helps"), [(1, False), (2, False), (3, True), (4, True), (5, False), (6, False)]
)
def test_compaction_helps_if_only_then_an_aligned_run_is_long_enough(num_tokens: int, helps: bool) -> None:
    manager = BlockManager(8, 1, allocator="buddy")
    for i in range(8):
        manager.allocate(i, [i])
    for i in (0, 1, 3, 4, 6):  # a run of two; once 2, 5 and 7 are moved to the start, one of four
        manager.free(i)
    assert manager.compaction_helps(num_tokens) == helps
