"""The interface of what computes attention over blocks: one `Backend` per kind of device, chosen once per layer."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import mlx.core as mx

from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.cache.kv_cache import LayerPool
from mlx_paged.cache.layer_spec import LayerSpec

MAX_DECODE_QUERIES = 8  # a few: more are a prompt


class AttentionOptions(NamedTuple):
    """How scores become weights, as in `paged_attention`."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: mx.array | None = None


class Backend(ABC):
    """Writes K and V into a layer's blocks, and computes attention over them.

    Pools are contiguous. Arguments are right by construction: only the public `paged_attention` checks them.
    """

    name: str

    @abstractmethod
    def is_available(self) -> bool:
        """Whether this process has the device for it, and work was not put on another."""

    def unsupported(self, layer: LayerSpec, num_heads: int, block_size: int) -> str | None:
        """Why it can't compute layers like this, in one line. None if it can."""
        return None

    def max_decode_queries(self, layer: LayerSpec, num_heads: int) -> int:
        """Query tokens of one sequence that such a layer computes while it reads the sequence's blocks once."""
        return MAX_DECODE_QUERIES

    def write(self, pool: LayerPool, metadata: AttentionMetadata, keys: mx.array, values: mx.array) -> None:
        """Put the K and V of a step's tokens, [num_tokens, num_kv_heads, dim], into the metadata's slots."""
        assert metadata.slot_block_ids is not None and metadata.slot_offsets is not None
        pool.write(metadata.slot_block_ids, metadata.slot_offsets, keys, values)

    @abstractmethod
    def attend(self, q: mx.array, pool: LayerPool, metadata: AttentionMetadata, options: AttentionOptions) -> mx.array:
        """Attention of q [num_tokens, num_heads, head_dim], whose rows are contiguous, over the sequences' blocks.

        Returns [num_tokens, num_heads, value_dim] in q's dtype.
        """


def in_order(
    outputs: list[mx.array], token_order: mx.array | None, num_tokens: int, shape: tuple[int, ...], dtype: mx.Dtype
) -> mx.array:
    """Put the outputs of a step's parts, [..., *shape], in the order of its tokens, with zeros for padding."""
    num_padding = num_tokens - sum(len(out) for out in outputs)
    if num_padding or not outputs:
        outputs = [*outputs, mx.zeros((num_padding, *shape), dtype)]
    result = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
    return result if token_order is None else result[token_order]
