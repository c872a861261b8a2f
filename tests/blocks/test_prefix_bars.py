"""The prefix tree as bars, and how a prompt compares with it."""

from __future__ import annotations

import pytest
from helpers.block_managers import run

from mlx_paged import BlockManager
from mlx_paged.blocks import prefix_bars as module
from mlx_paged.blocks.prefix_bars import nearest_prefix, prefix_bars
from mlx_paged.outputs import PrefixBar

HEAD = [1, 2, 3, 4]


def bars_of(manager: BlockManager, most: int = 100) -> tuple[list[PrefixBar], int]:
    _, allocator, tree = manager.parts
    return prefix_bars(tree, allocator.ref_counts, manager.block_size, most)


def shape(bars: list[PrefixBar]) -> list[tuple[int, int, int, bool]]:
    return [(bar.depth, bar.num_blocks, bar.num_holders, bar.last) for bar in bars]


def make_manager() -> BlockManager:
    """Two prompts that begin alike, one of which is held, a third one that goes on from the second, and another."""
    manager = BlockManager(40, 2)
    run(manager, "held", [*HEAD, 5, 5, 5, 5, 5, 5, 0])
    for number, prompt in enumerate(([*HEAD, 6, 6, 0], [*HEAD, 6, 6, 7, 7, 0], [*HEAD, 6, 6, 8, 8, 0], [9, 9, 0])):
        run(manager, str(number), prompt)
        manager.free(str(number))
    return manager


def test_what_does_not_branch_is_one_bar_and_branches_follow_in_depth_first_order() -> None:
    bars, num_more = bars_of(make_manager())
    assert shape(bars) == [
        (0, 2, 1, False),
        (1, 3, 1, False),
        (1, 1, 0, True),
        (2, 1, 0, False),
        (2, 1, 0, True),
        (0, 1, 0, True),
    ]
    assert [bar.first_tokens for bar in bars] == [HEAD, [5] * 6, [6] * 2, [7] * 2, [8] * 2, [9] * 2]
    assert [bar.num_tokens for bar in bars] == [4, 6, 2, 2, 2, 2] and num_more == 0


def test_of_too_many_bars_those_with_most_behind_them_are_kept_and_the_others_counted() -> None:
    bars, num_more = bars_of(make_manager(), most=3)
    assert shape(bars) == [(0, 2, 1, True), (1, 3, 1, False), (1, 1, 0, True)] and num_more == 3


def test_of_a_large_tree_the_blocks_that_were_cached_first_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_NODES", 4)
    bars, num_more = bars_of(make_manager())
    assert shape(bars) == [(0, 4, 1, True)] and num_more == 5


def test_a_block_that_was_overwritten_counts_for_nothing_while_longer_prefixes_keep_its_place() -> None:
    manager = make_manager()
    _, _, tree = manager.parts
    head = next(node for node in tree.nodes() if list(node.tokens) == HEAD[:2])
    assert head.block_id is not None
    tree.evict(head.block_id)
    assert shape(bars_of(manager)[0])[0] == (0, 1, 1, False)


def test_an_empty_tree_has_no_bars() -> None:
    assert bars_of(BlockManager(4, 2)) == ([], 0)


@pytest.mark.parametrize(
    "prompt, found",
    [
        ([7, 7], (0, 0, (1, 2))),
        ([1, 3, 3, 4], (0, 1, (2,))),
        (HEAD, (4, 4, (5, 5))),
        ([*HEAD, 6], (4, 5, (6,))),
        ([*HEAD, 5, 6, 6], (4, 5, (5,))),
        ([*HEAD, 5, 5, 5, 5, 5, 5, 1, 1], (10, 10, ())),
    ],
)
def test_a_prompt_is_compared_with_the_prefix_that_is_nearest(prompt: list[int], found: object) -> None:
    _, _, tree = make_manager().parts
    num_in_blocks, num_alike, goes_on = nearest_prefix(tree, None, prompt, 2)
    if not num_alike % 2 and goes_on:  # of several that have nothing more in common, any
        goes_on = found[2]  # type: ignore[index]
    assert (num_in_blocks, num_alike, goes_on) == found
    assert nearest_prefix(tree, "other", prompt, 2) == (0, 0, ())
