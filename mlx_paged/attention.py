"""Attention of ragged queries over a paged KV cache: the public function and what a step's layers share."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_paged import reference

BACKENDS = ("reference",)


class AttentionMetadata:
    """Which tokens a step computes and where their context lies; all layers of the step share one.

    block_tables: int32 [num_seqs, max_blocks], on the device and perhaps not computed yet: nothing here evaluates it.
    On the host: context_lens, int32 [num_seqs], tokens visible to a sequence's last query; cu_seqlens_q, int32
    [num_seqs + 1], the queries of sequence i are tokens cu_seqlens_q[i] to cu_seqlens_q[i + 1], the last ones of its
    context. What backends derive from them is made once.
    """

    def __init__(self, block_tables: mx.array, context_lens: np.ndarray, cu_seqlens_q: np.ndarray) -> None:
        self.block_tables = block_tables
        self.context_lens = context_lens
        self.cu_seqlens_q = cu_seqlens_q
        self._derived: dict[Any, Any] = {}

    @cached_property
    def query_lens(self) -> np.ndarray:
        return self.cu_seqlens_q[1:] - self.cu_seqlens_q[:-1]

    def derive(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns, made at the first call with `key`."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]


def paged_attention(
    q: mx.array,
    k_cache: mx.array,
    v_cache: mx.array,
    block_tables: mx.array | np.ndarray,
    context_lens: mx.array | np.ndarray,
    cu_seqlens_q: mx.array | np.ndarray,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    backend: str | None = None,
) -> mx.array:
    """Causal attention of the last tokens of each sequence over the sequence's blocks (Kwon et al. 2023).

    q: [num_tokens, num_heads, head_dim]; k_cache: [num_blocks, block_size, num_kv_heads, head_dim]; v_cache: the same
    with its own head size; both already hold the K and V of the queries' tokens. block_tables: int32 [num_seqs,
    max_blocks], entries past a sequence's context are ignored; context_lens: int32 [num_seqs]; cu_seqlens_q: int32
    [num_seqs + 1]. num_heads is a multiple of num_kv_heads.

    scale: multiplies the scores. window: a query sees its own key and the window - 1 before it. softcap: scores become
    softcap * tanh(score / softcap). sinks: [num_heads], a logit that takes part in each softmax without a value.
    backend: "reference", or None for the best one available.

    Returns [num_tokens, num_heads, value_dim] in q's dtype; a sequence with context 0 is padding and gives zeros.
    Values in unused slots, NaN included, have no influence. Raises ValueError or TypeError for arguments that don't
    fit together.
    """
    metadata = _checked_metadata(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (a query sees itself), got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, got {softcap}")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks must have one value per query head, [{q.shape[1]}], got {list(sinks.shape)}")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not available here; there is: {', '.join(BACKENDS)}")
    return attend(q, k_cache, v_cache, metadata, scale=scale, window=window, softcap=softcap, sinks=sinks)


def attend(
    q: mx.array,
    k_cache: mx.array,
    v_cache: mx.array,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """`paged_attention` without its checks, for callers whose metadata is right by construction."""
    return reference.attend(
        q, k_cache, v_cache, metadata, scale=scale, window=window, softcap=softcap, sinks=sinks
    )


def _checked_metadata(
    q: mx.array,
    k_cache: mx.array,
    v_cache: mx.array,
    block_tables: mx.array | np.ndarray,
    context_lens: mx.array | np.ndarray,
    cu_seqlens_q: mx.array | np.ndarray,
) -> AttentionMetadata:
    """The metadata, or the first thing wrong with the arguments as an error; checked on the host."""
    if q.ndim != 3 or k_cache.ndim != 4 or v_cache.ndim != 4:
        raise ValueError(
            "q must be [num_tokens, num_heads, head_dim], the caches [num_blocks, block_size, num_kv_heads, head_dim]; "
            f"got {list(q.shape)}, {list(k_cache.shape)} and {list(v_cache.shape)}"
        )
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise TypeError(f"q, k_cache and v_cache differ in dtype: {q.dtype}, {k_cache.dtype}, {v_cache.dtype}")
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(f"k_cache and v_cache differ in blocks: {list(k_cache.shape)} and {list(v_cache.shape)}")
    if q.shape[2] != k_cache.shape[3]:
        raise ValueError(f"head_dim of q is {q.shape[2]}, that of k_cache {k_cache.shape[3]}")
    if q.shape[1] % k_cache.shape[2]:
        raise ValueError(f"{q.shape[1]} query heads can't share {k_cache.shape[2]} KV heads evenly")
    arrays = {"block_tables": block_tables, "context_lens": context_lens, "cu_seqlens_q": cu_seqlens_q}
    host = {name: np.array(array) for name, array in arrays.items()}
    for name, array in host.items():
        if array.dtype != np.int32:
            raise TypeError(f"{name} must be int32, got {array.dtype}")
    tables, contexts, starts = host.values()
    if tables.ndim != 2 or contexts.shape != (len(tables),) or starts.shape != (len(tables) + 1,):
        raise ValueError(
            "block_tables must be [num_seqs, max_blocks], context_lens [num_seqs], cu_seqlens_q [num_seqs + 1]; "
            f"got {list(tables.shape)}, {list(contexts.shape)} and {list(starts.shape)}"
        )
    lengths = np.diff(starts)
    if starts[0] != 0 or (lengths < 0).any() or starts[-1] != q.shape[0]:
        raise ValueError(f"cu_seqlens_q must rise from 0 to the {q.shape[0]} tokens of q, got {starts.tolist()}")
    if (contexts < 0).any():
        raise ValueError(f"context_lens must not be negative, got {contexts.tolist()}")
    for i in np.nonzero((lengths > contexts) & (contexts > 0))[0]:
        raise ValueError(f"sequence {i} has {lengths[i]} queries but a context of {contexts[i]} tokens")
    num_blocks, block_size = k_cache.shape[:2]
    for i in np.nonzero(contexts > tables.shape[1] * block_size)[0]:
        raise ValueError(
            f"sequence {i} has a context of {contexts[i]} tokens, its table room for {tables.shape[1] * block_size}"
        )
    used = np.arange(tables.shape[1])[None, :] < -(-contexts // block_size)[:, None]
    if (bad := tables[used & ((tables < 0) | (tables >= num_blocks))]).size:
        raise ValueError(f"block_tables names block {bad[0]}; the cache has blocks 0 to {num_blocks - 1}")
    return AttentionMetadata(mx.array(tables), contexts, starts)
