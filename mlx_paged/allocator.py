"""The block pool: which block ids are free, how often each is referenced, and which free one is reused next.

It knows ids only: no tokens, no tables, no arrays.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Protocol

from mlx_paged.errors import OutOfBlocks


class FreeBlocks(Protocol):
    """The free blocks of a pool in the order of their reuse. Every operation is O(1) per block.

    A free block may still be *cached*: its content can be found by a prefix and used again until it is taken.
    """

    def __len__(self) -> int: ...

    def add(self, block_id: int, cached: bool) -> None:
        """`block_id` has become free."""

    def take(self) -> int:
        """The free block to reuse next, which leaves the collection."""

    def remove(self, block_id: int) -> None:
        """The free block `block_id` is used again for what it holds."""

    def forget(self, block_id: int) -> None:
        """The free block `block_id` is not cached any more."""

    def rename(self, mapping: dict[int, int]) -> None:
        """Contents have moved: each free block in `mapping` is now the one it maps to."""


class FifoFreeBlocks:
    """The block that has been free longest goes first, cached or not.

    Pays when prefixes rarely repeat: it is the simplest order, and ids come out in the order they went in.
    """

    def __init__(self, num_blocks: int) -> None:
        self._order: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    def __len__(self) -> int:
        return len(self._order)

    def add(self, block_id: int, cached: bool) -> None:
        self._order[block_id] = None

    def take(self) -> int:
        return self._order.popitem(last=False)[0]

    def remove(self, block_id: int) -> None:
        del self._order[block_id]

    def forget(self, block_id: int) -> None:
        pass

    def rename(self, mapping: dict[int, int]) -> None:
        self._order = OrderedDict.fromkeys(mapping.get(block_id, block_id) for block_id in self._order)


class LruFreeBlocks:
    """Blocks that hold nothing of use go first, then the cached one that was used least recently.

    Blocks of one sequence are added deepest first, so a cached chain is consumed from its end and what is left of
    it can still be hit. Pays when requests share prefixes: system prompts, conversations, few-shot examples.
    """

    def __init__(self, num_blocks: int) -> None:
        self._empty = FifoFreeBlocks(num_blocks)
        self._cached = FifoFreeBlocks(0)

    def __len__(self) -> int:
        return len(self._empty) + len(self._cached)

    def add(self, block_id: int, cached: bool) -> None:
        (self._cached if cached else self._empty).add(block_id, cached)

    def take(self) -> int:
        return (self._empty if len(self._empty) else self._cached).take()

    def remove(self, block_id: int) -> None:
        self._cached.remove(block_id)

    def forget(self, block_id: int) -> None:
        self._cached.remove(block_id)
        self._empty.add(block_id, cached=False)

    def rename(self, mapping: dict[int, int]) -> None:
        self._empty.rename(mapping)
        self._cached.rename(mapping)


POLICIES: dict[str, Callable[[int], FreeBlocks]] = {"fifo": FifoFreeBlocks, "lru": LruFreeBlocks}


class BlockAllocator:
    """Reference counts over block ids 0 .. num_blocks - 1; a block without references is free."""

    def __init__(self, num_blocks: int, policy: str = "lru") -> None:
        if policy not in POLICIES:
            raise ValueError(f"allocator must be one of {', '.join(sorted(POLICIES))}, got {policy!r}")
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self._free = POLICIES[policy](num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, each with one reference. Raises OutOfBlocks with nothing changed."""
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks needed, {len(self._free)} of {self.num_blocks} are free")
        block_ids = [self._free.take() for _ in range(count)]
        for block_id in block_ids:
            self.ref_counts[block_id] = 1
        return block_ids

    def retain(self, block_ids: Iterable[int]) -> None:
        """Add a reference to each block; a free one stops being free."""
        for block_id in block_ids:
            if self.ref_counts[block_id] == 0:
                self._free.remove(block_id)
            self.ref_counts[block_id] += 1

    def release(self, block_ids: Iterable[int], is_cached: Callable[[int], bool]) -> None:
        """Drop a reference of each block; one without references becomes free, in the order given."""
        for block_id in block_ids:
            self.ref_counts[block_id] -= 1
            if self.ref_counts[block_id] == 0:
                self._free.add(block_id, is_cached(block_id))

    def forget(self, block_id: int) -> None:
        """A free block's content is of no use any more."""
        self._free.forget(block_id)

    def move(self, moves: list[tuple[int, int]]) -> None:
        """Follow contents that moved from block to block, one (src, dst) after another, each dst free by then."""
        content_of = {block_id: block_id for move in moves for block_id in move}
        for src, dst in moves:
            content_of[src], content_of[dst] = content_of[dst], content_of[src]
        new_counts = {now: self.ref_counts[before] for now, before in content_of.items()}
        for block_id, count in new_counts.items():
            self.ref_counts[block_id] = count
        self._free.rename({before: now for now, before in content_of.items()})
