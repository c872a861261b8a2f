"""The block allocator: which block ids are free, and how often each is referenced. It knows ids only."""

from collections.abc import Callable, Iterable

from mlx_paged.blocks.free_lists import POLICIES
from mlx_paged.errors import OutOfBlocks


class BlockAllocator:
    """Reference counts over block ids 0 .. num_blocks - 1; a block without references is free."""

    def __init__(self, num_blocks: int, policy: str = "lru") -> None:
        if policy not in POLICIES:
            raise ValueError(f"allocator must be one of {', '.join(POLICIES)}, got {policy!r}")
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self.free_blocks = POLICIES[policy](num_blocks)

    @property
    def num_free(self) -> int:
        return len(self.free_blocks)

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """Take `count` free blocks, each with one reference, to follow block `after` in a table.

        Returns their ids. Raises OutOfBlocks with nothing changed.
        """
        if count > self.num_free:
            raise OutOfBlocks(f"{count} blocks needed, {self.num_free} of {self.num_blocks} are free")
        block_ids = self.free_blocks.take(count, after)
        for block_id in block_ids:
            self.ref_counts[block_id] = 1
        return block_ids

    def retain(self, block_ids: Iterable[int]) -> None:
        """Add a reference to each block; a free one stops being free."""
        for block_id in block_ids:
            if self.ref_counts[block_id] == 0:
                self.free_blocks.remove(block_id)
            self.ref_counts[block_id] += 1

    def release(self, block_ids: Iterable[int], is_cached: Callable[[int], bool]) -> None:
        """Drop a reference of each block; one without references becomes free, in the order given."""
        for block_id in block_ids:
            self.ref_counts[block_id] -= 1
            if self.ref_counts[block_id] == 0:
                self.free_blocks.add(block_id, is_cached(block_id))

    def move(self, moves: list[tuple[int, int]]) -> None:
        """Follow contents that moved from block to block, one (src, dst) after another, each dst free by then."""
        content_of = {block_id: block_id for move in moves for block_id in move}
        for src, dst in moves:
            content_of[src], content_of[dst] = content_of[dst], content_of[src]
        new_counts = {now: self.ref_counts[before] for now, before in content_of.items()}
        for block_id, count in new_counts.items():
            self.ref_counts[block_id] = count
        self.free_blocks.rename({before: now for now, before in content_of.items()})
