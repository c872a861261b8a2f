"""Block tables, sharing, copy-on-write, prefix hits and compaction, down to the block ids."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from mlx_paged import BlockManager, OutOfBlocks
from mlx_paged.blocks.block_manager import NO_BLOCK

both_policies = pytest.mark.parametrize("allocator", ["lru", "fifo"])


def run(manager: BlockManager, seq_id: str, tokens: list[int], **options: Any) -> int:
    """Allocate a sequence and compute all of it; the number of tokens that were hit."""
    num_hit = manager.allocate(seq_id, tokens, **options)
    manager.mark_computed(seq_id, len(tokens))
    return num_hit


def reuse_order(manager: BlockManager) -> list[int]:
    """The free blocks in the order in which they would be taken."""
    allocator = copy.deepcopy(manager._allocator)
    return allocator.allocate(allocator.num_free)


def snapshot(manager: BlockManager) -> Any:
    """Everything of a manager that can be observed, now or later."""
    tables = {seq_id: manager.block_table(seq_id) for seq_id in manager.seq_ids}
    lengths = {seq_id: (manager.num_tokens(seq_id), manager.num_computed(seq_id)) for seq_id in manager.seq_ids}
    cached = [block_id for block_id in range(manager.num_blocks) if manager.is_cached(block_id)]
    refs = [manager.ref_count(block_id) for block_id in range(manager.num_blocks)]
    return tables, lengths, cached, refs, manager.num_free_blocks, reuse_order(manager)


def tokens(count: int, start: int = 0) -> list[int]:
    return list(range(start, start + count))


# -- tables -----------------------------------------------------------------------------------------------------


@both_policies
@pytest.mark.parametrize("count, blocks", [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_a_sequence_gets_just_the_blocks_its_tokens_need(allocator: str, count: int, blocks: int) -> None:
    manager = BlockManager(5, 4, allocator=allocator)
    assert manager.allocate("a", tokens(count)) == 0
    assert manager.block_table("a") == list(range(blocks))
    assert manager.num_tokens("a") == count
    assert manager.num_computed("a") == 0
    assert manager.num_free_blocks == 5 - blocks
    manager.check()


def test_all_blocks_of_the_pool_can_be_used() -> None:
    manager = BlockManager(3, 2)
    manager.allocate("a", tokens(6))
    assert manager.block_table("a") == [0, 1, 2]
    assert manager.num_free_blocks == 0


def test_a_block_size_of_one_works() -> None:
    manager = BlockManager(4, 1)
    assert run(manager, "a", [5, 6, 7]) == 0
    assert run(manager, "b", [5, 6, 7]) == 2
    assert manager.block_table("b") == [0, 1, 3]
    manager.check()


def test_append_takes_a_block_only_when_the_last_one_is_full() -> None:
    manager = BlockManager(4, 3)
    manager.allocate("a", [1])
    tables = []
    for token in range(2, 8):
        assert manager.append("a", [token]) == []
        tables.append(manager.block_table("a"))
    assert tables == [[0], [0], [0, 1], [0, 1], [0, 1], [0, 1, 2]]
    assert manager.num_tokens("a") == 7


def test_append_can_take_many_tokens_or_none() -> None:
    manager = BlockManager(4, 3)
    manager.allocate("a", [1])
    assert manager.append("a", []) == []
    assert manager.block_table("a") == [0]
    assert manager.append("a", tokens(9)) == []
    assert manager.block_table("a") == [0, 1, 2, 3]
    assert manager.num_tokens("a") == 10


def test_slot_translates_positions_through_the_table() -> None:
    manager = BlockManager(6, 4)
    manager.allocate("hole", tokens(8))
    manager.allocate("a", tokens(6, 100))
    manager.free("hole")
    manager.append("a", tokens(6, 106))
    table = manager.block_table("a")
    assert [manager.slot("a", position) for position in range(12)] == [(table[p // 4], p % 4) for p in range(12)]
    for outside in (-1, 12):
        with pytest.raises(IndexError, match=f"sequence 'a' .*{outside}"):
            manager.slot("a", outside)


def test_a_block_table_can_be_read_from_a_start_and_is_the_callers_own() -> None:
    manager = BlockManager(4, 1)
    manager.allocate("a", tokens(4))
    assert [manager.block_table("a", start) for start in range(6)] == [
        [0, 1, 2, 3],
        [1, 2, 3],
        [2, 3],
        [3],
        [],
        [],
    ]
    manager.block_table("a").clear()
    assert manager.block_table("a") == [0, 1, 2, 3]
    manager.check()


def test_the_callers_token_list_is_not_kept() -> None:
    manager = BlockManager(4, 2)
    prompt = [1, 2, 3]
    manager.allocate("a", prompt)
    prompt += [4, 5]
    assert manager.num_tokens("a") == 3
    manager.fork("a", "b")
    manager.append("a", [9])
    assert (manager.num_tokens("a"), manager.num_tokens("b")) == (4, 3)


# -- errors -----------------------------------------------------------------------------------------------------


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


# -- prefix caching ---------------------------------------------------------------------------------------------


@both_policies
def test_equal_prefixes_share_the_same_blocks(allocator: str) -> None:
    manager = BlockManager(10, 4, allocator=allocator)
    assert run(manager, "a", tokens(11)) == 0
    assert run(manager, "b", tokens(8) + [90, 91, 92, 93, 94]) == 8
    assert manager.block_table("a") == [0, 1, 2]
    assert manager.block_table("b") == [0, 1, 3, 4]
    assert [manager.ref_count(block_id) for block_id in range(6)] == [2, 2, 1, 1, 1, 0]
    assert manager.num_free_blocks == 5
    assert manager.num_computed("b") == 13
    manager.check()


@pytest.mark.parametrize("length, expected", [(1, 0), (4, 0), (5, 4), (7, 4), (8, 4), (9, 8), (12, 8), (20, 8)])
def test_whole_blocks_are_hit_and_the_last_token_is_always_left_to_compute(length: int, expected: int) -> None:
    manager = BlockManager(20, 4)
    run(manager, "a", tokens(8))
    assert manager.allocate("b", tokens(length)) == expected
    assert manager.num_computed("b") == expected
    assert manager.block_table("b")[: expected // 4] == [0, 1][: expected // 4]


def test_a_prompt_that_differs_in_one_token_shares_what_comes_before_it() -> None:
    manager = BlockManager(20, 4)
    run(manager, "a", tokens(12))
    for position, expected in ((0, 0), (3, 0), (4, 4), (7, 4), (8, 8), (11, 8)):
        prompt = tokens(12) + [99]
        prompt[position] = 77
        assert manager.allocate("b", prompt) == expected
        manager.free("b")


@pytest.mark.parametrize("most, expected", [(0, 0), (3, 0), (4, 4), (9, 8), (12, 12), (13, 12), (99, 12)])
def test_a_limit_on_what_is_hit_is_kept(most: int, expected: int) -> None:
    manager = BlockManager(20, 4)
    run(manager, "a", tokens(16))
    assert manager.num_cached_tokens(tokens(13), limit=most) == expected
    assert manager.num_cached_tokens(tokens(12), limit=most) <= 8, "the last token is left to compute"
    assert manager.allocate("b", tokens(13), max_cached=most) == expected
    assert manager.num_free_blocks == 20 - 4 - (4 - expected // 4)


def test_nothing_is_hit_before_it_is_computed() -> None:
    manager = BlockManager(20, 4)
    manager.allocate("a", tokens(12))
    for num_computed, expected in ((0, 0), (3, 0), (4, 4), (7, 4), (8, 8), (12, 12)):
        manager.mark_computed("a", num_computed)
        assert manager.allocate("b", tokens(13)) == expected
        manager.free("b")


def test_a_sequence_that_dies_in_the_middle_publishes_only_what_it_computed() -> None:
    manager = BlockManager(20, 4)
    manager.allocate("a", tokens(12))
    manager.mark_computed("a", 6)
    manager.free("a")
    assert manager.allocate("b", tokens(13)) == 4


def test_appended_tokens_are_hit_once_computed() -> None:
    manager = BlockManager(20, 2)
    run(manager, "a", [1, 2, 3])
    manager.append("a", [4])
    assert manager.allocate("early", [1, 2, 3, 4, 5]) == 2
    manager.mark_computed("a", 4)
    assert manager.allocate("late", [1, 2, 3, 4, 5]) == 4
    assert manager.block_table("late")[:2] == manager.block_table("a")


def test_a_fork_publishes_its_own_continuation() -> None:
    manager = BlockManager(20, 2)
    run(manager, "a", [1, 2, 3])
    manager.fork("a", "b")
    for seq_id, token in (("a", 8), ("b", 9)):
        manager.append(seq_id, [token])
        manager.mark_computed(seq_id, 4)
    for seq_id, token in (("a", 8), ("b", 9)):
        assert manager.allocate("probe", [1, 2, 3, token, 0]) == 4
        assert manager.block_table("probe")[:2] == manager.block_table(seq_id)
        manager.free("probe")


def test_salts_keep_prefixes_apart() -> None:
    manager = BlockManager(20, 2)
    run(manager, "a", tokens(5), salt="one")
    assert manager.allocate("other", tokens(5), salt="two") == 0
    assert manager.allocate("none", tokens(5)) == 0
    assert manager.allocate("same", tokens(5), salt="one") == 4


def test_without_prefix_caching_nothing_is_shared_and_blocks_go_back_empty() -> None:
    manager = BlockManager(6, 2, prefix_caching=False)
    assert run(manager, "a", tokens(4)) == 0
    assert run(manager, "b", tokens(5)) == 0
    assert manager.block_table("b") == [2, 3, 4]
    manager.free("a")
    manager.free("b")
    assert reuse_order(manager) == [5, 1, 0, 4, 3, 2]
    manager.check()


@both_policies
def test_blocks_of_a_finished_sequence_are_free_and_still_hit(allocator: str) -> None:
    manager = BlockManager(4, 2, allocator=allocator)
    run(manager, "a", tokens(4))
    manager.free("a")
    assert manager.num_free_blocks == 4
    assert [manager.ref_count(block_id) for block_id in range(4)] == [0, 0, 0, 0]
    assert manager.allocate("b", tokens(5)) == 4
    assert manager.block_table("b") == [0, 1, 2]
    assert manager.num_free_blocks == 1
    manager.check()


def test_a_reused_block_is_not_hit_any_more() -> None:
    manager = BlockManager(2, 2)
    run(manager, "a", tokens(4))
    manager.free("a")
    manager.allocate("b", [90])  # takes block 1, the deepest of the chain
    assert manager.block_table("b") == [1]
    manager.free("b")
    assert manager.allocate("c", tokens(4)) == 2


def test_a_prefix_computed_twice_is_stored_once_in_the_cache() -> None:
    manager = BlockManager(6, 2)
    manager.allocate("a", tokens(3))
    manager.allocate("b", tokens(3))
    manager.mark_computed("a", 3)
    manager.mark_computed("b", 3)
    assert (manager.block_table("a"), manager.block_table("b")) == ([0, 1], [2, 3])
    assert manager.allocate("c", tokens(3)) == 2
    assert manager.block_table("c") == [0, 4]
    manager.check()


def test_a_missing_middle_block_is_filled_by_the_next_sequence_and_what_follows_is_found_again() -> None:
    manager = BlockManager(8, 2, allocator="fifo")
    run(manager, "a", tokens(6))
    manager.fork("a", "holds")  # keeps the blocks referenced
    manager.free("a")
    middle = manager.block_table("holds")[1]
    manager._tree.evict(middle)
    assert manager.allocate("b", tokens(7)) == 2
    manager.mark_computed("b", 7)
    assert manager.block_table("b") == [0, 3, 4, 5]
    assert manager.allocate("c", tokens(7)) == 6
    assert manager.block_table("c") == [0, 3, 2, 6]
    manager.check()


def test_lru_reuses_never_cached_blocks_then_the_least_recently_used_chain_from_its_end() -> None:
    manager = BlockManager(10, 2, allocator="lru")
    run(manager, "a", tokens(5))  # blocks 0 1 | 2 half full
    run(manager, "b", tokens(6, 50))  # blocks 3 4 5
    manager.free("a")
    manager.free("b")
    assert reuse_order(manager) == [6, 7, 8, 9, 2, 1, 0, 5, 4, 3]
    # A hit makes a's chain the most recently used one; its new last block is only partly filled.
    assert run(manager, "again", tokens(5)) == 4
    manager.free("again")
    assert reuse_order(manager) == [7, 8, 9, 2, 6, 5, 4, 3, 1, 0]


def test_fifo_reuses_the_longest_free_block_cached_or_not() -> None:
    manager = BlockManager(10, 2, allocator="fifo")
    run(manager, "a", tokens(5))
    run(manager, "b", tokens(6, 50))
    manager.free("b")
    manager.free("a")
    assert reuse_order(manager) == [6, 7, 8, 9, 5, 4, 3, 2, 1, 0]
    assert run(manager, "again", tokens(5)) == 4
    manager.free("again")
    assert reuse_order(manager) == [7, 8, 9, 5, 4, 3, 2, 6, 1, 0]


def test_eviction_under_lru_takes_a_chain_from_its_end_and_leaves_a_shorter_hit() -> None:
    manager = BlockManager(4, 2)
    run(manager, "a", tokens(8))
    manager.free("a")
    for taken, left in ((3, 6), (2, 4), (1, 2), (0, 0)):
        manager.allocate(f"new {taken}", [90 + taken])
        assert manager.block_table(f"new {taken}") == [taken]
        assert len(manager._tree._node_of_block) * 2 == left
    manager.check()


def test_blocks_in_use_are_never_evicted() -> None:
    manager = BlockManager(4, 2)
    run(manager, "a", tokens(4))
    run(manager, "b", tokens(4, 50))
    manager.free("b")
    manager.allocate("c", [90, 91, 92])
    assert manager.block_table("c") == [3, 2]
    with pytest.raises(OutOfBlocks):
        manager.allocate("d", [1])
    assert manager.block_table("a") == [0, 1]


def test_a_live_sequence_goes_on_publishing_after_its_prefix_was_dropped() -> None:
    manager = BlockManager(6, 2, allocator="fifo")
    manager.allocate("first", tokens(4))
    manager.allocate("twin", tokens(4))  # the same tokens in blocks of its own
    manager.mark_computed("first", 4)
    manager.mark_computed("twin", 4)
    manager.free("first")
    run(manager, "other", tokens(8, 50))  # takes the free blocks and all that `first` had cached
    manager.free("other")
    manager.append("twin", [4, 5])
    manager.mark_computed("twin", 6)
    manager.check()
    # The first two blocks of the prefix are in nobody's cache now, so nothing is found, and nothing wrong.
    assert manager.allocate("probe", tokens(4)) == 0


# -- fork and copy-on-write -------------------------------------------------------------------------------------


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


# -- publishing ---------------------------------------------------------------------------------------------------


def test_published_blocks_are_hit_by_sequences_of_the_same_step() -> None:
    manager = BlockManager(8, 4)
    manager.allocate("a", tokens(10))
    assert [node.block_id for node in manager.publish("a", 7)] == [0]
    assert [node.block_id for node in manager.publish("a", 10)] == [1]
    assert manager.allocate("b", tokens(10)) == 8
    manager.mark_computed("a", 10)
    manager.mark_computed("b", 10)
    manager.check()


def test_what_was_published_and_not_computed_is_not_hit() -> None:
    manager = BlockManager(8, 4)
    manager.allocate("a", tokens(10))
    manager.mark_computed("a", 4)
    manager.unpublish(manager.publish("a", 10))
    manager.free("a")
    assert manager.allocate("b", tokens(10)) == 4
    manager.check()


# -- windows ----------------------------------------------------------------------------------------------------


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


def test_a_window_of_less_than_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        BlockManager(4, 2, window=0)


# -- counting ---------------------------------------------------------------------------------------------------


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


# -- compaction -------------------------------------------------------------------------------------------------


def fill(manager: BlockManager, sizes: dict[str, int]) -> None:
    for start, (seq_id, count) in enumerate(sizes.items()):
        run(manager, seq_id, tokens(count, 100 * start))


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


# -- check() itself ---------------------------------------------------------------------------------------------


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
