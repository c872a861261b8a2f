"""What a block manager refuses, and that a refused call changes nothing."""

from __future__ import annotations

import pytest
from helpers.block_managers import run, snapshot, tokens

from mlx_paged import BlockManager, OutOfBlocks
from mlx_paged.blocks.free_lists import POLICIES

both_policies = pytest.mark.parametrize("allocator", ["lru", "fifo"])


@pytest.mark.parametrize("num_blocks, block_size", [(0, 16), (-1, 16), (4, 0), (4, -2)])
def test_a_pool_without_blocks_or_without_tokens_per_block_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match=f"{num_blocks} blocks of {block_size}"):
        BlockManager(num_blocks, block_size)


def test_unknown_ids_raise_key_error_naming_the_id() -> None:
    manager = BlockManager(4, 2)
    run(manager, "a", [1, 2, 3])
    before = snapshot(manager)
    for call in (
        lambda: manager.append("ghost", [1]),
        lambda: manager.append("ghost", []),
        lambda: manager.mark_computed("ghost", 1),
        lambda: manager.fork("ghost", "b"),
        lambda: manager.fork("ghost", "a"),
        lambda: manager.free("ghost"),
        lambda: manager.block_table("ghost"),
        lambda: manager.num_tokens("ghost"),
        lambda: manager.num_computed("ghost"),
        lambda: manager.slot("ghost", 0),
    ):
        with pytest.raises(KeyError, match="ghost"):
            call()
    for block_id in (-1, 4):
        with pytest.raises(KeyError, match="0 to 3"):
            manager.ref_count(block_id)
    assert snapshot(manager) == before


def test_a_sequence_is_freed_exactly_once() -> None:
    manager = BlockManager(4, 2)
    manager.allocate("a", [1, 2, 3])
    manager.free("a")
    before = snapshot(manager)
    with pytest.raises(KeyError, match="'a'"):
        manager.free("a")
    with pytest.raises(KeyError, match="'a'"):
        manager.fork("a", "b")
    assert snapshot(manager) == before
    assert manager.num_free_blocks == 4


def test_a_live_id_is_not_given_away_again() -> None:
    manager = BlockManager(8, 2)
    run(manager, "a", [1, 2, 3])
    run(manager, "b", [4, 5])
    before = snapshot(manager)
    for call in (
        lambda: manager.allocate("a", [7]),
        lambda: manager.fork("a", "b"),
        lambda: manager.fork("a", "a"),
    ):
        with pytest.raises(ValueError, match="is live"):
            call()
    assert snapshot(manager) == before


def test_an_id_can_be_used_again_after_it_was_freed() -> None:
    manager = BlockManager(2, 2)
    manager.allocate("a", [1, 2, 3])
    manager.free("a")
    assert manager.allocate("a", [4]) == 0
    assert manager.num_tokens("a") == 1


def test_a_sequence_without_tokens_is_refused() -> None:
    manager = BlockManager(4, 2)
    with pytest.raises(ValueError, match="no tokens"):
        manager.allocate("a", [])
    assert manager.seq_ids == []


@pytest.mark.parametrize("num_tokens", [-1, 2, 6])
def test_only_tokens_that_exist_and_are_new_can_be_marked_computed(num_tokens: int) -> None:
    manager = BlockManager(4, 2)
    manager.allocate("a", tokens(5))
    manager.mark_computed("a", 3)
    before = snapshot(manager)
    with pytest.raises(ValueError, match=f"{num_tokens} computed tokens, but 3 .* has 5"):
        manager.mark_computed("a", num_tokens)
    assert snapshot(manager) == before
    manager.mark_computed("a", 3)
    manager.mark_computed("a", 5)
    assert manager.num_computed("a") == 5


@both_policies
def test_allocating_more_than_is_free_changes_nothing_even_with_a_hit(allocator: str) -> None:
    manager = BlockManager(5, 2, allocator=allocator)
    run(manager, "gone", tokens(4))
    run(manager, "live", tokens(3, 50))
    manager.free("gone")
    before = snapshot(manager)
    # Two blocks are hit, free as they are, three more are needed and one is left.
    with pytest.raises(OutOfBlocks, match="need 3 blocks beside 2 cached ones, 1 of 5"):
        manager.allocate("b", tokens(4) + tokens(5, 90))
    assert snapshot(manager) == before
    assert "b" not in manager.seq_ids
    assert run(manager, "b", tokens(4) + [90]) == 4
    manager.check()


@both_policies
def test_appending_more_than_is_free_changes_nothing(allocator: str) -> None:
    manager = BlockManager(3, 2, allocator=allocator)
    run(manager, "a", [1, 2, 3])
    run(manager, "b", [8])
    before = snapshot(manager)
    with pytest.raises(OutOfBlocks):
        manager.append("a", [4, 5])
    assert snapshot(manager) == before
    assert manager.append("a", [4]) == []


@both_policies
def test_a_copy_that_finds_no_block_changes_nothing(allocator: str) -> None:
    manager = BlockManager(2, 2, allocator=allocator)
    run(manager, "a", [1, 2, 3])
    manager.fork("a", "b")
    before = snapshot(manager)
    with pytest.raises(OutOfBlocks):
        manager.append("b", [4])
    assert snapshot(manager) == before
    manager.free("a")
    assert manager.append("b", [4]) == []


def test_a_copy_and_a_new_block_are_had_together_or_not_at_all() -> None:
    manager = BlockManager(3, 2)
    run(manager, "a", [1, 2, 3])
    manager.fork("a", "b")
    before = snapshot(manager)
    with pytest.raises(OutOfBlocks):
        manager.append("b", [4, 5])  # a copy of block 1 and one more; only one is free
    assert snapshot(manager) == before


@pytest.mark.parametrize("allocator", sorted(POLICIES))
def test_sequences_that_can_not_all_grow_do_not_grow_at_all(allocator: str) -> None:
    manager = BlockManager(5, 2, allocator=allocator)
    for i in range(3):
        run(manager, str(i), tokens(2, 10 * i))
    before = snapshot(manager)
    with pytest.raises(OutOfBlocks, match=r"3 blocks needed, 2 of 5 are free"):
        manager.append_blocks(["0", "1", "2"])
    assert snapshot(manager) == before
