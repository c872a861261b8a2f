"""The interface of what computes attention over blocks: one `Backend` per kind of device, chosen once per layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_paged.attention.metadata import AttentionMetadata


class AttentionOptions(NamedTuple):
    """How scores become weights, as in `paged_attention`."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: mx.array | None = None


class Backend(ABC):
    """Writes K and V into blocks, and computes attention over them.

    Pools are k_cache [num_blocks, block_size, num_kv_heads, head_dim] and v_cache, the same with its own head size,
    both contiguous. Arguments are right by construction: only the public `paged_attention` checks them.
    """

    name: str
    max_decode_queries: int = 1
    """Query tokens of one sequence that its path for decodes takes."""
    writes_in_place: bool = False
    """Whether `write` is of the pools' own memory without MLX's knowing of it. Otherwise MLX copies a pool that an
    earlier step still reads."""

    @abstractmethod
    def is_available(self) -> bool:
        """Whether this process has the device for it, and work was not put on another."""

    def unsupported(self, dtype: mx.Dtype, num_heads: int, block_shape: Sequence[int], value_dim: int) -> str | None:
        """Why it can't compute layers like this, in one line. None if it can.

        block_shape: block_size, num_kv_heads, head_dim.
        """
        return None

    def write(
        self, k_cache: mx.array, v_cache: mx.array, metadata: AttentionMetadata, keys: mx.array, values: mx.array
    ) -> mx.array | None:
        """Put the K and V of a step's tokens, [num_tokens, num_kv_heads, dim], into the metadata's slots.

        Returns what `attend` has to be given as `write_done`, if that has to be told when the write is over.
        """
        slots = metadata.slot_block_ids, metadata.slot_offsets
        k_cache[slots], v_cache[slots] = keys, values
        return None

    @abstractmethod
    def attend(
        self,
        q: mx.array,
        k_cache: mx.array,
        v_cache: mx.array,
        metadata: AttentionMetadata,
        options: AttentionOptions,
        write_done: mx.array | None = None,
    ) -> mx.array:
        """Attention of q [num_tokens, num_heads, head_dim], whose rows are contiguous, over the sequences' blocks.

        Returns [num_tokens, num_heads, value_dim] in q's dtype. write_done: what the last `write` into these pools
        returned.
        """


def check_arrays(q: mx.array, k_cache: mx.array, v_cache: mx.array, sinks: mx.array | None) -> None:
    """Raise ValueError for arrays that do not fit together, TypeError if it is for their dtypes."""
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise TypeError(f"q, k_cache and v_cache differ in dtype: {q.dtype}, {k_cache.dtype}, {v_cache.dtype}")
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(f"k_cache and v_cache differ in blocks: {list(k_cache.shape)} and {list(v_cache.shape)}")
    if q.shape[2] != k_cache.shape[3]:
        raise ValueError(f"head_dim of q is {q.shape[2]}, that of k_cache {k_cache.shape[3]}")
    if q.shape[1] % k_cache.shape[2]:
        raise ValueError(f"{q.shape[1]} query heads can't share {k_cache.shape[2]} KV heads evenly")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks must have one value per query head, [{q.shape[1]}], got {list(sinks.shape)}")


def in_order(
    outputs: list[mx.array], token_order: mx.array | None, num_tokens: int, shape: tuple[int, ...], dtype: mx.Dtype
) -> mx.array:
    """Put the outputs of a step's parts, [..., *shape], in the order of its tokens, with zeros for padding."""
    num_padding = num_tokens - sum(len(out) for out in outputs)
    if num_padding or not outputs:
        outputs = [*outputs, mx.zeros((num_padding, *shape), dtype)]
    result = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
    return result if token_order is None else result[token_order]
