"""Block tables: how they grow, and where a position lies."""

from __future__ import annotations

import pytest
from helpers.block_managers import run, tokens

from mlx_paged import BlockManager

both_policies = pytest.mark.parametrize("allocator", ["lru", "fifo"])


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


def test_under_buddy_each_sequence_that_grows_gets_the_block_after_its_last_one() -> None:
    manager = BlockManager(16, 2, allocator="buddy")
    manager.allocate("short", tokens(2))
    manager.allocate("long", tokens(4, 50))
    assert (manager.block_table("short"), manager.block_table("long")) == ([0], [2, 3])
    assert manager.append_blocks(["long", "short"]) == [4, 1]
    assert (manager.block_table("short"), manager.block_table("long")) == ([0, 1], [2, 3, 4])
    manager.check()
