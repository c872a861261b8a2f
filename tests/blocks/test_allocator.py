"""Reference counts, and the order in which each policy reuses free blocks."""

import pytest

from mlx_paged.blocks.allocator import BlockAllocator
from mlx_paged.blocks.free_lists import POLICIES, FifoFreeBlocks, FreeBlocks, LruFreeBlocks
from mlx_paged.errors import OutOfBlocks

both_policies = pytest.mark.parametrize("policy", ["fifo", "lru"])


def nothing(block_id: int) -> bool:
    return False


def everything(block_id: int) -> bool:
    return True


def drain(allocator: BlockAllocator) -> list[int]:
    """The free blocks in the order in which they are reused."""
    return allocator.allocate(allocator.num_free)


@both_policies
def test_a_new_pool_hands_out_its_blocks_in_ascending_order(policy: str) -> None:
    allocator = BlockAllocator(5, policy)
    assert allocator.num_free == 5
    assert allocator.allocate(2) == [0, 1]
    assert allocator.allocate(3) == [2, 3, 4]
    assert allocator.num_free == 0
    assert allocator.ref_counts == [1] * 5


@both_policies
def test_blocks_without_content_are_reused_in_the_order_they_became_free(policy: str) -> None:
    allocator = BlockAllocator(6, policy)
    allocator.allocate(6)
    allocator.release([4, 1], nothing)
    allocator.release([5, 0], nothing)
    assert drain(allocator) == [4, 1, 5, 0]


def test_fifo_takes_the_longest_free_block_whether_cached_or_not() -> None:
    allocator = BlockAllocator(6, "fifo")
    allocator.allocate(4)
    allocator.release([3], everything)
    allocator.release([1], nothing)
    allocator.release([0, 2], {0}.__contains__)
    assert drain(allocator) == [4, 5, 3, 1, 0, 2]


def test_lru_takes_never_cached_blocks_first_then_cached_ones_by_last_use() -> None:
    allocator = BlockAllocator(6, "lru")
    allocator.allocate(5)
    allocator.release([3], everything)
    allocator.release([1], nothing)
    allocator.release([0, 2], {0}.__contains__)
    assert drain(allocator) == [5, 1, 2, 3, 0]


def test_lru_consumes_a_chain_from_the_end_that_was_released_first() -> None:
    allocator = BlockAllocator(6, "lru")
    old, new = allocator.allocate(3), allocator.allocate(3)
    allocator.release(old[::-1], everything)
    allocator.release(new[::-1], everything)
    assert drain(allocator) == [2, 1, 0, 5, 4, 3]


@both_policies
def test_a_cached_block_used_again_goes_to_the_back_of_the_queue(policy: str) -> None:
    allocator = BlockAllocator(3, policy)
    allocator.allocate(3)
    allocator.release([0, 1, 2], everything)
    allocator.retain([0])
    assert allocator.num_free == 2
    allocator.release([0], everything)
    assert drain(allocator) == [1, 2, 0]


@both_policies
def test_a_retained_free_block_is_not_handed_out(policy: str) -> None:
    allocator = BlockAllocator(3, policy)
    allocator.allocate(3)
    allocator.release([0, 1, 2], everything)
    allocator.retain([1])
    assert allocator.ref_counts == [0, 1, 0]
    assert drain(allocator) == [0, 2]


@both_policies
def test_a_block_is_free_only_after_its_last_reference(policy: str) -> None:
    allocator = BlockAllocator(2, policy)
    assert allocator.allocate(1) == [0]
    allocator.retain([0])
    allocator.retain([0])
    for expected_refs, expected_free in ((2, 1), (1, 1), (0, 2)):
        allocator.release([0], nothing)
        assert (allocator.ref_counts[0], allocator.num_free) == (expected_refs, expected_free)


@both_policies
def test_too_large_a_request_changes_nothing(policy: str) -> None:
    allocator = BlockAllocator(5, policy)
    allocator.allocate(3)
    allocator.release([2, 0], {2}.__contains__)
    counts = list(allocator.ref_counts)
    with pytest.raises(OutOfBlocks, match=r"5 blocks needed, 4 of 5 are free"):
        allocator.allocate(5)
    assert allocator.ref_counts == counts
    assert drain(allocator) == {"fifo": [3, 4, 2, 0], "lru": [3, 4, 0, 2]}[policy]


@both_policies
def test_allocating_nothing_takes_nothing_even_from_an_exhausted_pool(policy: str) -> None:
    allocator = BlockAllocator(1, policy)
    allocator.allocate(1)
    assert allocator.allocate(0) == []


@both_policies
def test_reference_counts_follow_moved_contents(policy: str) -> None:
    allocator = BlockAllocator(5, policy)
    allocator.allocate(5)
    allocator.retain([4, 4])
    allocator.release([0, 2], nothing)
    allocator.move([(4, 0), (3, 2)])
    assert allocator.ref_counts == [3, 1, 1, 0, 0]
    assert sorted(drain(allocator)) == [3, 4]


@both_policies
def test_free_cached_contents_keep_their_place_in_the_order_when_they_move(policy: str) -> None:
    allocator = BlockAllocator(6, policy)
    allocator.allocate(6)
    allocator.release([5], nothing)
    allocator.release([0, 1, 2], everything)
    # The cached content of 0 goes to 5, then block 4 into the hole: the content is still the first of the cached ones.
    allocator.move([(0, 5), (4, 0)])
    assert allocator.ref_counts == [1, 0, 0, 1, 0, 0]
    assert drain(allocator) == [4, 5, 1, 2]


@both_policies
def test_a_forgotten_cached_block_is_reused_as_an_empty_one(policy: str) -> None:
    allocator = BlockAllocator(3, policy)
    allocator.allocate(3)
    allocator.release([0, 1, 2], everything)
    allocator.free_blocks.uncache(1)
    assert allocator.num_free == 3
    assert drain(allocator) == {"fifo": [0, 1, 2], "lru": [1, 0, 2]}[policy]


@pytest.mark.parametrize("free_blocks", [FifoFreeBlocks, LruFreeBlocks])
def test_renaming_to_each_other_swaps_places(free_blocks: type[FreeBlocks]) -> None:
    free = free_blocks(4)  # type: ignore[call-arg]
    free.rename({0: 3, 3: 0})
    assert free.take(1) + free.take(3) == [3, 1, 2, 0]
    assert len(free) == 0


def test_buddy_gives_consecutive_blocks_from_the_best_fitting_run() -> None:
    allocator = BlockAllocator(16, "buddy")
    assert allocator.allocate(3) == [0, 1, 2]
    assert allocator.allocate(4) == [4, 5, 6, 7]
    assert allocator.allocate(1) == [3], "the single block that is left over, not the start of a long run"
    assert allocator.allocate(8) == list(range(8, 16))


def test_buddy_goes_on_after_the_last_block_of_a_table_if_that_is_free() -> None:
    allocator = BlockAllocator(16, "buddy")
    assert allocator.allocate(2) == [0, 1]
    assert allocator.allocate(2, after=1) == [2, 3]
    assert allocator.allocate(1, after=0) != [1]


def test_buddy_prefers_the_block_after_a_tables_last_one_to_a_better_fit() -> None:
    allocator = BlockAllocator(16, "buddy")
    assert allocator.allocate(1) + allocator.allocate(2) == [0, 2, 3]  # of one block alone there is only 1
    assert allocator.allocate(1, after=3) == [4]


def test_buddy_has_a_run_as_long_as_its_longest_free_one_and_no_longer() -> None:
    allocator = BlockAllocator(8, "buddy")
    assert [allocator.free_blocks.has_run(count) for count in (1, 5, 8, 9)] == [True, True, True, False]
    allocator.allocate(1)
    assert [allocator.free_blocks.has_run(count) for count in (1, 3, 4, 5)] == [True, True, True, False]
    allocator.allocate(7)
    assert not allocator.free_blocks.has_run(1)
    assert all(BlockAllocator(1, policy).free_blocks.has_run(9) for policy in ("fifo", "lru")), "they do not care"


def test_buddy_makes_do_with_pieces_rather_than_refuse() -> None:
    allocator = BlockAllocator(8, "buddy")
    allocator.allocate(8)
    allocator.release([1, 3, 5, 7], nothing)
    assert sorted(allocator.allocate(4)) == [1, 3, 5, 7]
    with pytest.raises(OutOfBlocks):
        allocator.allocate(1)


def test_buddy_merges_runs_that_are_free_again() -> None:
    allocator = BlockAllocator(16, "buddy")
    allocator.allocate(16)
    allocator.release([9, 3, 12, 0, 7, 5, 10, 1, 15, 6, 2, 11, 4, 14, 8, 13], nothing)
    assert allocator.allocate(16) == list(range(16))


@pytest.mark.parametrize("num_blocks", [1, 3, 6, 7, 13, 100])
def test_buddy_serves_pools_of_any_size_again_after_contents_have_moved(num_blocks: int) -> None:
    allocator = BlockAllocator(num_blocks, "buddy")
    allocator.allocate(num_blocks)
    allocator.move([])
    allocator.release(range(num_blocks), nothing)
    assert sorted(drain(allocator)) == list(range(num_blocks))


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("num_blocks", [1, 2, 1000])
def test_every_block_of_the_pool_is_usable(policy: str, num_blocks: int) -> None:
    allocator = BlockAllocator(num_blocks, policy)
    assert sorted(drain(allocator)) == list(range(num_blocks))
    with pytest.raises(OutOfBlocks):
        allocator.allocate(1)


def test_an_unknown_policy_is_refused_with_the_known_ones_named() -> None:
    with pytest.raises(ValueError, match=r"allocator must be one of .*lru, fifo.*'mru'"):
        BlockAllocator(4, "mru")


def test_the_configuration_offers_exactly_the_policies_there_are() -> None:
    from mlx_paged.config import ALLOCATORS

    assert set(ALLOCATORS) == set(POLICIES)
