"""Forks: shared blocks, and the copy before the first write to a shared, partly filled one."""

from __future__ import annotations

from helpers.block_managers import run, tokens

from mlx_paged import BlockManager


def test_a_fork_shares_every_block_and_takes_none() -> None:
    manager = BlockManager(4, 2)
    run(manager, "a", tokens(5))
    manager.fork("a", "b")
    assert manager.block_table("b") == manager.block_table("a") == [0, 1, 2]
    assert [manager.ref_count(block_id) for block_id in range(4)] == [2, 2, 2, 0]
    assert manager.num_free_blocks == 1
    assert (manager.num_tokens("b"), manager.num_computed("b")) == (5, 5)
    manager.check()


def test_the_first_write_to_a_shared_last_block_copies_it_and_the_last_owner_writes_in_place() -> None:
    manager = BlockManager(8, 4)
    run(manager, "a", tokens(6))
    manager.fork("a", "b")
    manager.fork("a", "c")
    assert manager.append("b", [70]) == [(1, 2)]
    assert manager.append("a", [71]) == [(1, 3)]
    assert manager.append("c", [72]) == []
    assert [manager.block_table(seq_id) for seq_id in "abc"] == [[0, 3], [0, 2], [0, 1]]
    assert manager.append("b", [73]) == []
    assert [manager.ref_count(block_id) for block_id in range(4)] == [3, 1, 1, 1]
    manager.check()


def test_a_fork_at_a_block_boundary_copies_nothing() -> None:
    manager = BlockManager(8, 4)
    run(manager, "a", tokens(8))
    manager.fork("a", "b")
    assert manager.append("b", [70]) == []
    assert manager.append("a", [71]) == []
    assert [manager.block_table(seq_id) for seq_id in "ab"] == [[0, 1, 3], [0, 1, 2]]


def test_an_append_over_several_blocks_copies_one() -> None:
    manager = BlockManager(8, 2)
    run(manager, "a", tokens(3))
    manager.fork("a", "b")
    assert manager.append("b", tokens(4, 70)) == [(1, 2)]
    assert manager.block_table("b") == [0, 2, 3, 4]
    assert manager.block_table("a") == [0, 1]
    manager.check()


def test_an_empty_append_to_a_shared_block_copies_nothing() -> None:
    manager = BlockManager(8, 2)
    run(manager, "a", tokens(3))
    manager.fork("a", "b")
    assert manager.append("b", []) == []
    assert manager.block_table("b") == [0, 1]


def test_freeing_one_of_two_owners_frees_no_shared_block() -> None:
    manager = BlockManager(4, 2)
    run(manager, "a", tokens(5))
    manager.fork("a", "b")
    manager.free("a")
    assert manager.num_free_blocks == 1
    assert manager.append("b", [9]) == []
    manager.free("b")
    assert manager.num_free_blocks == 4
    manager.check()


def test_a_fork_of_a_fork_outlives_both_parents() -> None:
    manager = BlockManager(4, 2)
    run(manager, "a", tokens(3))
    manager.fork("a", "b")
    manager.fork("b", "c")
    manager.free("a")
    manager.free("b")
    assert manager.block_table("c") == [0, 1]
    assert manager.append("c", [4, 5]) == []
    assert manager.block_table("c") == [0, 1, 2]
    manager.check()


def test_a_fork_in_the_middle_of_a_prompt_shares_only_what_is_computed_with_others() -> None:
    manager = BlockManager(8, 2)
    manager.allocate("a", tokens(5))
    manager.mark_computed("a", 2)
    manager.fork("a", "b")
    assert manager.num_computed("b") == 2
    assert manager.allocate("c", tokens(5)) == 2
    manager.mark_computed("b", 5)
    manager.mark_computed("a", 5)
    manager.check()
