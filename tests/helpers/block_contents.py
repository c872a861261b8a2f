"""What the blocks of every cache group hold, simulated in arrays.

A slot holds one number that stands for the whole prefix up to its token, as real K and V do, so a block that is given
back, reused, copied or moved wrongly is seen as soon as the keys that a query sees are read back through the table.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_paged import BlockManager
from mlx_paged.blocks.block_manager import NO_BLOCK
from mlx_paged.blocks.cache_groups import CacheGroups
from mlx_paged.blocks.transfers import BlockCopy

Written = tuple[np.ndarray, int, int, int]  # an array of blocks, a block and an offset in it, and what it held before


def most_blocks(window: int, block_size: int) -> int:
    """The most blocks that `window` consecutive tokens can touch."""
    return -(-(window - 1) // block_size) + 1


def visible(window: int | None, position: int, *, chunked: bool = False) -> range:
    """The positions whose keys the query at `position` sees: the last `window`, or those of its chunk."""
    if window is None:
        return range(position + 1)
    return range(position // window * window if chunked else max(0, position - window + 1), position + 1)


def held(manager: BlockManager, seq_id: int) -> list[int]:
    return [block_id for block_id in manager.block_table(seq_id) if block_id != NO_BLOCK]


def slot(manager: BlockManager, seq_id: int, position: int) -> tuple[int, int]:
    """As `BlockManager.slot`, also of a token that has been given a slot ahead of its name."""
    block_id = manager.block_table(seq_id)[position // manager.block_size]
    assert block_id != NO_BLOCK
    return block_id, position % manager.block_size


class Contents:
    """What the blocks of every group hold, and the number that stands for a prefix."""

    def __init__(self, groups: CacheGroups) -> None:
        self.groups = groups
        self.arrays = [np.full((manager.num_blocks, manager.block_size), -1) for manager in groups.managers]
        self._numbers: dict[tuple[int, ...], int] = {}

    def number(self, tokens: Sequence[int], position: int) -> int:
        return self._numbers.setdefault(tuple(tokens[: position + 1]), len(self._numbers))

    def run_transfers(self) -> None:
        """What the groups want copied."""
        for transfer in self.groups.transfers:
            assert isinstance(transfer, BlockCopy)
            self.arrays[transfer.group][transfer.dst] = self.arrays[transfer.group][transfer.src]
        self.groups.transfers.clear()

    def write(self, seq_id: int, tokens: Sequence[int], start: int, end: int) -> list[Written]:
        """Write the tokens at positions start .. end - 1; what was overwritten."""
        written = []
        for array, manager in zip(self.arrays, self.groups.managers, strict=True):
            for position in range(start, end):
                block_id, offset = slot(manager, seq_id, position)
                written.append((array, block_id, offset, array[block_id, offset]))
                array[block_id, offset] = self.number(tokens, position)
        return written

    def check_visible(self, seq_id: int, tokens: Sequence[int], query: int, end: int) -> None:
        """The keys that the query at `query` sees, of those below `end`, are the sequence's own in every group."""
        for array, manager in zip(self.arrays, self.groups.managers, strict=True):
            for position in visible(manager.window, query, chunked=manager.chunked):
                if position < end:
                    read = array[slot(manager, seq_id, position)]
                    assert read == self.number(tokens, position), (seq_id, manager.window, query, position)

    def cached(self, group: int) -> set[tuple[int, ...]]:
        """The contents of the blocks that can be hit."""
        manager = self.groups.managers[group]
        return {tuple(self.arrays[group][b].tolist()) for b in range(manager.num_blocks) if manager.is_cached(b)}

    def longest_hit(self, tokens: Sequence[int]) -> int:
        """By brute force: from how many leading tokens a new sequence could go on in every group."""
        block_size = self.groups.block_size
        blocks = [
            tuple(self.number(tokens, position) for position in range(start, start + block_size))
            for start in range(0, len(tokens) - block_size + 1, block_size)
        ]
        cached = [self.cached(group) for group in range(len(self.arrays))]
        for num_blocks in range((len(tokens) - 1) // block_size, 0, -1):
            end = num_blocks * block_size
            needed = (
                {p // block_size for p in visible(manager.window, end, chunked=manager.chunked) if p < end}
                for manager in self.groups.managers
            )
            if all(blocks[i] in cached[group] for group, indices in enumerate(needed) for i in indices):
                return end
        return 0
