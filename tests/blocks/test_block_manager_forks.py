"""Forks: shared blocks, and the copy before the first write to a shared, partly filled one."""

from __future__ import annotations

import pytest
from helpers.block_managers import run, snapshot, tokens

from mlx_paged import BlockManager, OutOfBlocks


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


# -- slots reserved ahead ----------------------------------------------------------------------------------------


def reserved_ahead(num_tokens: int, num_reserved: int, num_blocks: int = 8) -> tuple[BlockManager, list[int]]:
    """A sequence "a" with `num_tokens` computed tokens and slots for `num_reserved`, in blocks of 4; and its list."""
    manager, token_ids = BlockManager(num_blocks, 4), tokens(num_tokens)
    manager.attach("a", token_ids, num_tokens)
    manager.mark_computed("a", num_tokens)
    assert manager.reserve("a", num_reserved) == []
    return manager, token_ids


def test_a_slot_reserved_ahead_in_a_shared_block_is_reserved_again_and_copies_the_block() -> None:
    manager, token_ids = reserved_ahead(6, 7)
    manager.fork("a", "b", list(token_ids))
    assert manager.block_table("a") == manager.block_table("b") == [0, 1]
    assert (manager.num_tokens("a"), manager.num_tokens("b"), manager.num_computed("b")) == (6, 6, 6)
    assert manager.reserve("a", 7) == [(1, 2)]
    assert manager.reserve("b", 7) == []
    assert (manager.block_table("a"), manager.block_table("b")) == ([0, 2], [0, 1])
    manager.check()


def test_a_block_taken_ahead_at_a_block_boundary_is_not_shared_by_a_fork() -> None:
    manager, token_ids = reserved_ahead(8, 9)
    manager.fork("a", "b", list(token_ids))
    assert (manager.block_table("a"), manager.block_table("b")) == ([0, 1, 2], [0, 1])
    assert [manager.ref_count(block_id) for block_id in range(4)] == [2, 2, 1, 0]
    assert manager.reserve("a", 9) == manager.reserve("b", 9) == []
    assert (manager.block_table("a"), manager.block_table("b")) == ([0, 1, 2], [0, 1, 3])
    manager.check()


def test_a_block_given_to_a_sequence_by_itself_is_not_shared_by_a_fork() -> None:
    manager, token_ids = reserved_ahead(8, 8)
    assert manager.append_blocks(["a"]) == [2]
    manager.fork("a", "b", list(token_ids))
    assert (manager.block_table("a"), manager.block_table("b")) == ([0, 1, 2], [0, 1])
    assert (manager.num_slots("a"), manager.num_slots("b")) == (12, 8)
    manager.free("a")
    assert manager.ref_count(2) == 0
    manager.check()


def test_a_fork_of_a_sequence_with_blocks_ahead_of_a_shared_tail_copies_the_tail_alone() -> None:
    manager, token_ids = reserved_ahead(6, 13)
    manager.fork("a", "b", list(token_ids))
    assert (manager.block_table("a"), manager.block_table("b")) == ([0, 1, 2, 3], [0, 1])
    assert manager.reserve("a", 13) == [(1, 4)]
    assert manager.block_table("a") == [0, 4, 2, 3]
    assert manager.reserve("b", 9) == []
    assert manager.block_table("b") == [0, 1, 5]
    manager.check()


def test_a_copy_of_a_tail_below_blocks_taken_ahead_that_finds_no_block_changes_nothing() -> None:
    manager, token_ids = reserved_ahead(6, 9, num_blocks=3)
    manager.fork("a", "b", list(token_ids))
    before = snapshot(manager)
    with pytest.raises(OutOfBlocks):
        manager.reserve("a", 7)
    assert snapshot(manager) == before
    manager.free("b")
    assert manager.reserve("a", 9) == []
    assert manager.block_table("a") == [0, 1, 2]


def test_a_fork_reads_its_own_list_of_tokens() -> None:
    manager, token_ids = reserved_ahead(6, 7)
    own = list(token_ids)
    manager.fork("a", "b", own)
    for seq_id, ids, token in (("a", token_ids, 70), ("b", own, 80)):
        manager.reserve(seq_id, 8)
        ids += [token, token + 1]
        manager.mark_computed(seq_id, 8)
    for token, seq_id in ((70, "a"), (80, "b")):
        assert manager.allocate("probe", [*tokens(6), token, token + 1, 0]) == 8
        assert manager.block_table("probe")[:2] == manager.block_table(seq_id)
        manager.free("probe")
    manager.check()
