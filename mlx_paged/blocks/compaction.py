"""Compaction: which blocks to move so that the free space is one run, and whether that helps."""

from mlx_paged.blocks.allocator import BlockAllocator
from mlx_paged.blocks.prefix_tree import PrefixTree


def compact(allocator: BlockAllocator, tree: PrefixTree) -> list[tuple[int, int]]:
    """Do what `BlockManager.compact` says, in the allocator and the tree."""
    ref_counts = allocator.ref_counts
    num_used = allocator.num_blocks - allocator.num_free
    holes = [block_id for block_id in range(num_used) if ref_counts[block_id] == 0]
    holes.sort(key=lambda block_id: block_id in tree)  # empty ones first: filling them makes room
    outside = range(num_used, allocator.num_blocks)
    sources = [block_id for block_id in outside if ref_counts[block_id] > 0]
    empty = [block_id for block_id in outside if ref_counts[block_id] == 0 and block_id not in tree]
    moves: list[tuple[int, int]] = []
    for src, dst in zip(sources, holes, strict=True):
        if dst in tree and empty:
            moves.append((dst, empty.pop()))
        elif dst in tree:
            tree.evict(dst)
            allocator.free_blocks.uncache(dst)
        moves.append((src, dst))
        empty.append(src)
    allocator.move(moves)
    for src, dst in moves:
        tree.move(src, dst)
    return moves


def compaction_helps(allocator: BlockAllocator, count: int) -> bool:
    """Say whether `count` blocks would come in pieces now, and in one run after `compact`."""
    if allocator.free_blocks.has_run(count):
        return False
    # Runs start at multiples of their length, so the free space behind the used blocks may not hold a whole one.
    length = 1 << (count - 1).bit_length()
    num_used = allocator.num_blocks - allocator.num_free
    return -(-num_used // length) * length + length <= allocator.num_blocks
