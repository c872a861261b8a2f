"""Look at a whole pool: the tokens that it holds, and whether its invariants hold."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping

from mlx_paged.blocks.allocator import BlockAllocator
from mlx_paged.blocks.prefix_tree import PrefixTree
from mlx_paged.blocks.sequence_blocks import NO_BLOCK, SequenceBlocks


def num_kv_tokens(sequences: Iterable[SequenceBlocks], block_size: int) -> int:
    """Count the tokens that have a slot, those in shared blocks once."""
    filled: dict[int, int] = {}
    for sequence in sequences:
        num_full = sequence.num_tokens // block_size
        filled |= dict.fromkeys(sequence.table[sequence.num_released : num_full], block_size)
        if tail := sequence.num_tokens % block_size:
            filled[sequence.table[num_full]] = max(tail, filled.get(sequence.table[num_full], 0))
    return sum(filled.values())


def check(
    sequences: Mapping[Hashable, SequenceBlocks],
    allocator: BlockAllocator,
    tree: PrefixTree,
    block_size: int,
    first_visible: Callable[[int], int],
) -> None:
    """Raise AssertionError if an invariant is broken.

    first_visible: of a number of computed tokens, the first table entry that later queries can see.
    """
    holders = Counter(block_id for sequence in sequences.values() for block_id in sequence.held_blocks)
    for block_id, count in enumerate(allocator.ref_counts):
        assert count == holders[block_id], f"block {block_id} has {count} references, {holders[block_id]} holders"
    assert allocator.num_free == allocator.num_blocks - len(holders), "free blocks and used blocks don't add up"
    tree.check()
    for seq_id, sequence in sequences.items():
        held, num_tokens, num_computed = sequence.held_blocks, sequence.num_tokens, sequence.num_computed
        assert len(sequence.table) * block_size >= num_tokens, f"{seq_id!r}: table too short"
        assert len(set(held)) == len(held), f"{seq_id!r} holds a block twice"
        assert sequence.table.count(NO_BLOCK) == sequence.num_released, f"{seq_id!r}: blocks lost"
        assert sequence.num_released <= first_visible(num_computed), f"{seq_id!r}: visible, released"
        assert num_computed <= num_tokens, f"{seq_id!r}: more computed than there is"
        assert num_computed <= len(sequence.token_ids), f"{seq_id!r}: computed tokens that nobody knows"
        assert sequence.num_published * block_size <= num_computed, f"{seq_id!r}: hit too early"
