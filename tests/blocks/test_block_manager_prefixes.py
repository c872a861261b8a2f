"""Prefixes: which blocks are hit, when a block is published, and which cached block is reused first."""

from __future__ import annotations

import pytest
from helpers.block_managers import reuse_order, run, tokens

from mlx_paged import BlockManager, OutOfBlocks
from mlx_paged.blocks.free_lists import POLICIES
from mlx_paged.blocks.prefix_tree import PrefixNode

both_policies = pytest.mark.parametrize("allocator", ["lru", "fifo"])


# -- hits ---------------------------------------------------------------------------------------------------------


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
    assert manager.num_cached_tokens(tokens(length)) == expected
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


# -- eviction -----------------------------------------------------------------------------------------------------


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


class NotingStore:
    """A block store that has some digests; which blocks it should save, and which it should load."""

    def __init__(self) -> None:
        self.digests: set[bytes] = set()
        self.saved: list[int] = []
        self.loaded: list[tuple[bytes, int]] = []

    def __contains__(self, digest: object) -> bool:
        return digest in self.digests

    def save(self, node: PrefixNode, block_id: int) -> None:
        self.saved.append(block_id)

    def load(self, node: PrefixNode, block_id: int) -> None:
        self.loaded.append((node.digest, block_id))


@pytest.mark.parametrize("allocator", sorted(POLICIES))
def test_an_evicted_block_is_stored_if_it_was_hit_or_its_sequence_will_come_back(allocator: str) -> None:
    store = NotingStore()
    manager = BlockManager(8, 2, allocator=allocator, store=store)
    run(manager, "hit", tokens(4))
    run(manager, "preempted", tokens(4, 50))
    run(manager, "neither", tokens(4, 80))
    assert run(manager, "hits", tokens(5)) == 4
    expected = {*manager.block_table("hit"), *manager.block_table("preempted")}
    for seq_id in manager.seq_ids:
        manager.free(seq_id, will_return=seq_id == "preempted")
    assert store.saved == []
    manager.allocate("all", tokens(16, 200))
    assert sorted(store.saved) == sorted(expected)


def test_a_prefix_of_a_preempted_sequence_is_stored_whoevers_block_holds_it() -> None:
    """As where both computed it at the same time."""
    store = NotingStore()
    manager = BlockManager(8, 2, store=store)
    for seq_id in ("first", "preempted"):
        manager.allocate(seq_id, tokens(4))
    for seq_id in ("first", "preempted"):
        manager.mark_computed(seq_id, 4)
    first = manager.block_table("first")
    manager.free("preempted", will_return=True)
    manager.free("first")
    manager.allocate("all", tokens(16, 200))
    assert sorted(store.saved) == sorted(first)


def test_blocks_that_the_store_has_are_hit_and_loaded_where_the_pool_has_none() -> None:
    store = NotingStore()
    manager = BlockManager(8, 2, store=store)
    run(manager, "a", tokens(8))
    digests = [digest for _, digest in manager.cached_prefixes("a")]
    manager.free("a")
    manager.allocate("most", tokens(14, 90))  # all but the first of its blocks
    manager.free("most")
    assert manager.num_cached_tokens(tokens(9)) == 2
    store.digests |= {*digests[1:3]}
    assert manager.num_cached_tokens(tokens(9)) == 6
    assert manager.allocate("b", tokens(9)) == 6
    assert store.loaded == list(zip(digests[1:3], manager.block_table("b")[1:3], strict=True))
    assert manager.allocate("c", tokens(9)) == 6, "they are in the pool now"
    assert len(store.loaded) == 2
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


def test_what_another_sequence_published_first_is_not_unpublished_with_a_step_that_failed() -> None:
    manager = BlockManager(8, 2)
    manager.allocate("a", tokens(5))
    manager.allocate("twin", tokens(5))
    assert len(manager.publish("a", 5)) == 2
    assert manager.publish("twin", 5) == []
    manager.mark_computed("a", 5)
    assert manager.num_cached_tokens(tokens(5)) == 4
