"""What tests ask of a block manager: sequences that are computed at once, and all that can be observed of it."""

from __future__ import annotations

import copy
from typing import Any

from mlx_paged import BlockManager


def run(manager: BlockManager, seq_id: str, tokens: list[int], **options: Any) -> int:
    """Allocate a sequence and compute all of it; the number of tokens that were hit."""
    num_hit = manager.allocate(seq_id, tokens, **options)
    manager.mark_computed(seq_id, len(tokens))
    return num_hit


def fill(manager: BlockManager, sizes: dict[str, int]) -> None:
    for start, (seq_id, count) in enumerate(sizes.items()):
        run(manager, seq_id, tokens(count, 100 * start))


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
