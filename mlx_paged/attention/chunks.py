"""Attention in chunks: a query sees no key before the last multiple of the chunk's size, as in Llama 4.

Nothing has to know of it but this: a sequence is cut where a chunk begins, and each part is given to the attention as
a sequence of its own, whose block table begins with the chunk's first block.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_paged.attention.kernel_plan import MIN_INPUT_SIZE
from mlx_paged.attention.metadata import AttentionMetadata, ModelInputs


def check_chunks(sizes: Sequence[int | None], block_size: int) -> None:
    """Raise ValueError unless chunks of these sizes, in tokens, are whole blocks."""
    for size in sizes:
        if size is not None and size % block_size:
            raise ValueError(
                f"this model attends in chunks of {size} tokens, which must be whole blocks: take a block_size that "
                f"divides {size}, got {block_size}"
            )


def cut_into_chunks(inputs: ModelInputs, sizes: Sequence[int | None], block_size: int) -> ModelInputs:
    """Cut the sequences of a step where a chunk begins.

    sizes: of the chunks of each cache group, in tokens, multiples of the block size; None: the group has none.
    """
    groups = zip(inputs.groups, sizes, strict=True)
    return inputs._replace(groups=[each if size is None else _cut(each, size, block_size) for each, size in groups])


def _cut(metadata: AttentionMetadata, chunk: int, block_size: int) -> AttentionMetadata:
    """The metadata of the same queries in the same order, of sequences that begin where a chunk does."""
    ends, starts = metadata.context_lens, metadata.context_lens - metadata.query_lens
    num_parts = (ends - 1) // chunk - starts // chunk + 1
    sequence = np.repeat(np.arange(len(ends)), num_parts)
    part = np.arange(len(sequence)) - np.repeat(np.cumsum(num_parts) - num_parts, num_parts)
    begins = (starts[sequence] // chunk + part) * chunk
    context_lens = np.minimum(ends[sequence] - begins, chunk)
    query_lens = context_lens - np.maximum(starts[sequence] - begins, 0)
    num_blocks = max(MIN_INPUT_SIZE, -(-int(context_lens.max(initial=0)) // block_size))
    columns = np.minimum(begins[:, None] // block_size + np.arange(num_blocks), metadata.block_tables.shape[1] - 1)
    return AttentionMetadata(
        metadata.block_tables[mx.array(sequence[:, None].astype(np.int32)), mx.array(columns.astype(np.int32))],
        context_lens.astype(np.int32),
        np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32),
        slot_block_ids=metadata.slot_block_ids,
        slot_offsets=metadata.slot_offsets,
    )
