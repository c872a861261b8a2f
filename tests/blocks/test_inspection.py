"""What is counted and checked of a block manager's state."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.block_managers import run, tokens

from mlx_paged import BlockManager
from mlx_paged.blocks.inspection import num_kv_tokens
from mlx_paged.blocks.prefix_tree import PrefixTree
from mlx_paged.blocks.sequence_blocks import SequenceBlocks


def test_tokens_in_shared_blocks_are_counted_once() -> None:
    manager = BlockManager(12, 4)
    assert manager.num_kv_tokens() == 0
    run(manager, "a", tokens(10))
    assert manager.num_kv_tokens() == 10
    manager.fork("a", "b")
    assert manager.num_kv_tokens() == 10
    manager.append("b", [70])
    assert manager.num_kv_tokens() == 13  # 8 shared, 2 and 3 in the last blocks
    run(manager, "c", tokens(4) + [90])
    assert manager.num_kv_tokens() == 14
    manager.free("a")
    manager.free("b")
    assert manager.num_kv_tokens() == 5
    manager.free("c")
    assert manager.num_kv_tokens() == 0


def test_of_a_shared_block_as_many_tokens_are_counted_as_any_sequence_has_in_it() -> None:
    root = PrefixTree().root()
    lives = [SequenceBlocks([1, 2, 3, 4, 5], [0, 1], num_tokens, 0, 0, root) for num_tokens in (3, 4, 3)]
    assert num_kv_tokens(lives, 2) == num_kv_tokens(lives[::-1], 2) == num_kv_tokens(lives[1:], 2) == 4
    lives[1].num_tokens = 5
    lives[1].table.append(7)
    assert num_kv_tokens(lives, 2) == 5


def test_check_notices_a_broken_reference_count_table_or_cache_entry() -> None:
    def broken(break_it: Any) -> None:
        manager = BlockManager(6, 2)
        run(manager, "a", tokens(5))
        manager.check()
        break_it(manager)
        with pytest.raises(AssertionError):
            manager.check()

    def lost_reference(manager: BlockManager) -> None:
        manager._allocator.ref_counts[0] += 1

    def table_too_short(manager: BlockManager) -> None:
        manager._release([manager._sequences["a"].table.pop()])

    def block_twice(manager: BlockManager) -> None:
        manager._sequences["a"].table[1] = manager._sequences["a"].table[0]

    def hit_too_early(manager: BlockManager) -> None:
        manager._sequences["a"].num_computed = 3

    def wrong_node(manager: BlockManager) -> None:
        manager._tree._node_of_block[1].block_id = 4

    for break_it in (lost_reference, table_too_short, block_twice, hit_too_early, wrong_node):
        broken(break_it)
