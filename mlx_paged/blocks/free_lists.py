"""Free lists: in which order the free blocks of a pool are reused, by policy. They know ids only."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol


class FreeBlocks(Protocol):
    """The free blocks of a pool in the order of their reuse. Every operation is O(1) or O(log n) per block.

    A free block may still be *cached*: its content can be found by a prefix and used again until it is taken.
    """

    prefers_runs: bool = False
    """Whether it matters to the policy which block a block follows."""

    def __len__(self) -> int: ...

    def add(self, block_id: int, cached: bool) -> None:
        """Add a block that has become free."""

    def take(self, count: int, after: int | None = None) -> list[int]:
        """Remove and return the `count` blocks to reuse next. There must be as many.

        after: the block that they will follow in a table, for policies that keep tables consecutive.
        """

    def remove(self, block_id: int) -> None:
        """Remove a free block that is used again for what it holds."""

    def uncache(self, block_id: int) -> None:
        """Note that a free block is not cached any more."""
        return  # to most policies it is all the same

    def rename(self, mapping: dict[int, int]) -> None:
        """Follow contents that have moved: each free block in `mapping` is now the one it maps to."""

    def has_run(self, count: int) -> bool:
        """Say whether `take(count)` gives consecutive blocks, or the policy does not care."""
        return True


class FifoFreeBlocks(FreeBlocks):
    """The block that has been free longest goes first, cached or not.

    Pays when prefixes rarely repeat: it is the simplest order, and ids come out in the order they went in.
    """

    def __init__(self, num_blocks: int) -> None:
        self._order: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    def __len__(self) -> int:
        return len(self._order)

    def add(self, block_id: int, cached: bool) -> None:
        self._order[block_id] = None

    def take(self, count: int, after: int | None = None) -> list[int]:
        return [self._order.popitem(last=False)[0] for _ in range(count)]

    def remove(self, block_id: int) -> None:
        del self._order[block_id]

    def rename(self, mapping: dict[int, int]) -> None:
        self._order = OrderedDict.fromkeys(mapping.get(block_id, block_id) for block_id in self._order)


class LruFreeBlocks(FreeBlocks):
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

    def take(self, count: int, after: int | None = None) -> list[int]:
        num_empty = min(count, len(self._empty))
        return self._empty.take(num_empty) + self._cached.take(count - num_empty)

    def remove(self, block_id: int) -> None:
        self._cached.remove(block_id)

    def uncache(self, block_id: int) -> None:
        self._cached.remove(block_id)
        self._empty.add(block_id, cached=False)

    def rename(self, mapping: dict[int, int]) -> None:
        self._empty.rename(mapping)
        self._cached.rename(mapping)


class BuddyFreeBlocks(FreeBlocks):
    """Runs of consecutive blocks, in sizes of powers of two that merge with their buddies when both are free.

    A request for n blocks gets the start of the best-fitting run, a growing sequence the block after its last one if
    that is free; where there is no run long enough, several make do. Knuth, The Art of Computer Programming, 2.5.
    Pays where consecutive tables do: long transfers to and from swap, and attention that can read runs. Cached
    blocks are not spared, so prefixes live shorter than with "lru".
    """

    prefers_runs = True

    def __init__(self, num_blocks: int) -> None:
        self._num_free = 0
        self._order_at: dict[int, int] = {}  # start of a free run -> log2 of its length
        self._runs: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_blocks.bit_length() + 1)]
        self._add_range(0, num_blocks)

    def __len__(self) -> int:
        return self._num_free

    def add(self, block_id: int, cached: bool) -> None:
        self._add_run(block_id, 0)

    def take(self, count: int, after: int | None = None) -> list[int]:
        taken: list[int] = []
        while after is not None and len(taken) < count and self._run_with(after + 1) is not None:
            after += 1
            self.remove(after)
            taken.append(after)
        while (missing := count - len(taken)) > 0:  # the smallest run that is long enough, or else the longest one
            fitting = [order for order in range((missing - 1).bit_length(), len(self._runs)) if self._runs[order]]
            order = fitting[0] if fitting else max(i for i, runs in enumerate(self._runs) if runs)
            start = next(iter(self._runs[order]))
            length = self._pop_run(start)
            used = min(missing, length)
            self._add_range(start + used, start + length)
            taken += range(start, start + used)
        return taken

    def remove(self, block_id: int) -> None:
        start = self._run_with(block_id)
        if start is None:
            raise KeyError(f"block {block_id} is not free")
        length = self._pop_run(start)
        self._add_range(start, block_id)
        self._add_range(block_id + 1, start + length)

    def rename(self, mapping: dict[int, int]) -> None:
        free = [block_id for start in list(self._order_at) for block_id in range(start, start + self._pop_run(start))]
        for block_id in free:
            self._add_run(mapping.get(block_id, block_id), 0)

    def has_run(self, count: int) -> bool:
        return any(self._runs[(count - 1).bit_length() :])

    def _run_with(self, block_id: int) -> int | None:
        """The start of the free run that holds a block."""
        for order in range(len(self._runs)):
            start = block_id >> order << order
            if self._order_at.get(start) == order:
                return start
        return None

    def _pop_run(self, start: int) -> int:
        order = self._order_at.pop(start)
        del self._runs[order][start]
        self._num_free -= 1 << order
        return 1 << order

    def _add_run(self, start: int, order: int) -> None:
        """Add a run, merged with its buddy as long as that is free and as long."""
        while self._order_at.get(start ^ (1 << order)) == order:
            buddy = start ^ (1 << order)
            self._pop_run(buddy)
            start, order = min(start, buddy), order + 1
        self._order_at[start] = order
        self._runs[order][start] = None
        self._num_free += 1 << order

    def _add_range(self, start: int, end: int) -> None:
        """Add blocks start .. end - 1 as the longest aligned runs."""
        while start < end:
            order = (end - start).bit_length() - 1
            if start:
                order = min(order, (start & -start).bit_length() - 1)
            self._add_run(start, order)
            start += 1 << order


POLICIES: dict[str, Callable[[int], FreeBlocks]] = {
    "lru": LruFreeBlocks,
    "fifo": FifoFreeBlocks,
    "buddy": BuddyFreeBlocks,
}
