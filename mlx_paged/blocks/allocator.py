"""The block pool: which block ids are free, how often each is referenced, and which free one is reused next.

It knows ids only: no tokens, no tables, no arrays.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Protocol

from mlx_paged.errors import OutOfBlocks


class FreeBlocks(Protocol):
    """The free blocks of a pool in the order of their reuse. Every operation is O(1) or O(log n) per block.

    A free block may still be *cached*: its content can be found by a prefix and used again until it is taken.
    keeps_runs: whether it matters to the policy which block a block follows.
    """

    keeps_runs: bool

    def __len__(self) -> int: ...

    def add(self, block_id: int, cached: bool) -> None:
        """`block_id` has become free."""

    def take(self, count: int, after: int | None = None) -> list[int]:
        """The `count` free blocks to reuse next, which leave the collection; there are as many.

        after: the block that they will follow in a table, for policies that keep tables consecutive.
        """

    def remove(self, block_id: int) -> None:
        """The free block `block_id` is used again for what it holds."""

    def forget(self, block_id: int) -> None:
        """The free block `block_id` is not cached any more."""

    def rename(self, mapping: dict[int, int]) -> None:
        """Contents have moved: each free block in `mapping` is now the one it maps to."""

    def has_run(self, count: int) -> bool:
        """Whether `take(count)` gives consecutive blocks, or the policy does not care."""


class FifoFreeBlocks:
    """The block that has been free longest goes first, cached or not.

    Pays when prefixes rarely repeat: it is the simplest order, and ids come out in the order they went in.
    """

    keeps_runs = False

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

    def forget(self, block_id: int) -> None:
        pass

    def rename(self, mapping: dict[int, int]) -> None:
        self._order = OrderedDict.fromkeys(mapping.get(block_id, block_id) for block_id in self._order)

    def has_run(self, count: int) -> bool:
        return True


class LruFreeBlocks:
    """Blocks that hold nothing of use go first, then the cached one that was used least recently.

    Blocks of one sequence are added deepest first, so a cached chain is consumed from its end and what is left of
    it can still be hit. Pays when requests share prefixes: system prompts, conversations, few-shot examples.
    """

    keeps_runs = False

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

    def forget(self, block_id: int) -> None:
        self._cached.remove(block_id)
        self._empty.add(block_id, cached=False)

    def rename(self, mapping: dict[int, int]) -> None:
        self._empty.rename(mapping)
        self._cached.rename(mapping)

    def has_run(self, count: int) -> bool:
        return True


class BuddyFreeBlocks:
    """Runs of consecutive blocks, in sizes of powers of two that merge with their buddies when both are free.

    A request for n blocks gets the start of the best-fitting run, a growing sequence the block after its last one if
    that is free; where there is no run long enough, several make do. Knuth, The Art of Computer Programming, 2.5.
    Pays where consecutive tables do: long transfers to and from swap, and attention that can read runs. Cached
    blocks are not spared, so prefixes live shorter than with "lru".
    """

    keeps_runs = True

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
        while len(taken) < count:
            taken += self._take_from_best_run(count - len(taken))
        return taken

    def remove(self, block_id: int) -> None:
        start = self._run_with(block_id)
        if start is None:
            raise KeyError(f"block {block_id} is not free")
        length = self._pop_run(start)
        self._add_range(start, block_id)
        self._add_range(block_id + 1, start + length)

    def forget(self, block_id: int) -> None:
        pass

    def rename(self, mapping: dict[int, int]) -> None:
        free = [block_id for start in list(self._order_at) for block_id in range(start, start + self._pop_run(start))]
        for block_id in free:
            self._add_run(mapping.get(block_id, block_id), 0)

    def has_run(self, count: int) -> bool:
        return any(self._runs[(count - 1).bit_length() :])

    def _take_from_best_run(self, count: int) -> list[int]:
        """The smallest run of at least `count` blocks, cut to size, or else the longest run."""
        fitting = [order for order in range((count - 1).bit_length(), len(self._runs)) if self._runs[order]]
        order = fitting[0] if fitting else max(i for i, runs in enumerate(self._runs) if runs)
        start = next(iter(self._runs[order]))
        length = self._pop_run(start)
        used = min(count, length)
        self._add_range(start + used, start + length)
        return list(range(start, start + used))

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


class BlockAllocator:
    """Reference counts over block ids 0 .. num_blocks - 1; a block without references is free."""

    def __init__(self, num_blocks: int, policy: str = "lru") -> None:
        if policy not in POLICIES:
            raise ValueError(f"allocator must be one of {', '.join(POLICIES)}, got {policy!r}")
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self._free = POLICIES[policy](num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def keeps_runs(self) -> bool:
        """Whether it matters to the policy which block a block follows."""
        return self._free.keeps_runs

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """Take `count` free blocks, each with one reference, to follow block `after` in a table.

        Raises OutOfBlocks with nothing changed.
        """
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks needed, {len(self._free)} of {self.num_blocks} are free")
        block_ids = self._free.take(count, after)
        for block_id in block_ids:
            self.ref_counts[block_id] = 1
        return block_ids

    def has_run(self, count: int) -> bool:
        """Whether `count` blocks would come as one run, or the policy does not care."""
        return self._free.has_run(count)

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
