"""Groups of layers with different windows: a sequence starts from the same token in all of them."""

from __future__ import annotations

import pytest
from helpers.block_managers import snapshot

from mlx_paged import BlockManager, OutOfBlocks
from mlx_paged.blocks.cache_groups import CacheGroups
from mlx_paged.blocks.free_lists import POLICIES
from mlx_paged.blocks.transfers import BlockCopy


def test_all_groups_start_from_the_same_token() -> None:
    full, windowed = BlockManager(16, 2), BlockManager(8, 2, window=3)
    groups = CacheGroups([full, windowed])
    prompt = list(range(12))
    groups.attach(0, prompt, len(prompt))
    groups.reserve(0, 10)
    groups.mark_computed(0, 10)
    groups.fork(0, "keeper")  # holds the window before token 10
    groups.reserve(0, 12)
    groups.mark_computed(0, 12)
    groups.free(0)
    windowed.allocate("others", range(100, 114))  # overwrites what the window before token 12 needs
    windowed.free("others")
    assert full.num_cached_tokens([*prompt, 12]) == 12
    assert groups.attach(1, [*prompt, 12], len(prompt) + 1) == 10
    assert [manager.num_computed(1) for manager in groups.managers] == [10, 10]
    assert windowed.num_tokens(1) == 11  # a prompt's blocks are taken chunk by chunk
    groups.check()


def test_what_the_last_group_allows_is_asked_of_the_first_again() -> None:
    groups = CacheGroups([BlockManager(16, 2), BlockManager(6, 2, window=3), BlockManager(6, 2, window=3)])
    prompt = list(range(9))
    groups.attach(0, prompt, len(prompt))
    for end in (2, 6, 8):
        groups.reserve(0, end)
        groups.mark_computed(0, end)
        groups.fork(0, end)  # holds the window before token `end`
    groups.free(0)
    for manager, lost in zip(groups.managers[1:], (6, 8), strict=True):
        manager.free(lost)
        manager.allocate("others", range(100, 108))  # overwrites all that is not held
        manager.free("others")
    assert [manager.num_cached_tokens(prompt) for manager in groups.managers] == [8, 8, 6]
    assert (
        groups.attach(1, prompt, len(prompt)) == 2
    )  # the first windowed group can't start from 6, nor the second from 8


@pytest.mark.parametrize("allocator", sorted(POLICIES))
@pytest.mark.parametrize("short", [0, 1, 2])
def test_a_block_too_few_in_one_group_gives_none_in_any(short: int, allocator: str) -> None:
    """Three sequences whose last blocks are full, and two free blocks in one of the groups."""
    groups = CacheGroups.make(
        [3 + (2 if group == short else 3) for group in range(3)], [None, 3, 5], 2, allocator=allocator
    )
    for seq_id in range(3):
        groups.attach(seq_id, [10 * seq_id, 1], 2)
        groups.reserve(seq_id, 2)
        groups.mark_computed(seq_id, 2)
    before = [snapshot(manager) for manager in groups.managers]
    with pytest.raises(OutOfBlocks):
        groups.append_blocks([0, 1, 2], [2, 2, 2])
    assert [snapshot(manager) for manager in groups.managers] == before
    grown = groups.append_blocks([0, 1], [2, 2])
    assert [[manager.block_table(i)[-1] for i in (0, 1)] for manager in groups.managers] == grown
    groups.check()


def test_a_sequence_that_one_group_has_no_room_for_is_in_none() -> None:
    groups = CacheGroups.make([8, 2, 1], [None, 3, 5], 2)
    groups.attach(0, [1, 2, 3], 3)
    with pytest.raises(OutOfBlocks):
        groups.attach(1, [4, 5, 6], 3)
    assert [manager.seq_ids for manager in groups.managers] == [[0]] * 3
    assert [manager.num_free_blocks for manager in groups.managers] == [6, 1, 0]
    groups.check()


def test_a_shared_block_is_copied_in_every_group_before_it_is_written_and_counted() -> None:
    groups = CacheGroups.make([8, 8], [None, 3], 2)
    groups.attach(0, [1, 2, 3], 3)
    groups.reserve(0, 3)
    groups.mark_computed(0, 3)
    groups.fork(0, 1)
    groups.reserve(1, 4)
    copies = [
        (group, manager.block_table(0)[-1], manager.block_table(1)[-1]) for group, manager in enumerate(groups.managers)
    ]
    assert groups.transfers == [BlockCopy(*copy) for copy in copies]
    assert groups.num_cow_copies == 2
    groups.reserve(0, 4)
    assert groups.num_cow_copies == 2, "its last owner writes in place"
    groups.clear()
    assert groups.transfers == []
