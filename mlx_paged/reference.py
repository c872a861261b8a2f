"""Paged attention in plain MLX operations: runs on any device, and is what the kernels are measured against.

Sequences with equally many queries and contexts of similar length are computed together, so a batch of decodes costs
a few operations however many sequences it has. What one operation gathers or scores stays under `_MAX_BYTES`.

K and V are gathered a row of one head at a time, straight into the order that the matrix products want: on a CPU
gathering whole blocks and then transposing takes five times as long. Positions past a sequence's context read its
last token again, so that what unused slots hold, NaN included, is never read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

if TYPE_CHECKING:
    from mlx_paged.attention import AttentionMetadata

_MAX_BYTES = 128 << 20


class _Group(NamedTuple):
    """Sequences that are computed together, with as many queries each."""

    tokens: mx.array  # int32 [num_seqs, num_queries]: the queries' rows in q
    rows: mx.array  # int [num_seqs, num_kv_heads, num_keys]: the keys' rows in the cache as [-1, dim]
    visible: mx.array  # bool [num_seqs, 1, num_queries, num_keys]


class _Plan(NamedTuple):
    groups: list[_Group]
    order: mx.array | None  # int32 [num_tokens]: the row of each token in the groups' outputs, None if the same
    num_padding: int  # tokens of sequences without context, whose outputs come last


class _Shape(NamedTuple):
    """What a plan depends on beside the step's metadata."""

    block_size: int
    num_kv_heads: int
    num_heads: int
    dims: int  # of a key and a value together
    window: int | None


def attend(
    q: mx.array,
    k_cache: mx.array,
    v_cache: mx.array,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: mx.array | None,
) -> mx.array:
    """The reference backend of `paged_attention`; shapes as there."""
    _, block_size, num_kv_heads, key_dim = k_cache.shape
    value_dim = v_cache.shape[3]
    shape = _Shape(block_size, num_kv_heads, q.shape[1], key_dim + value_dim, window)
    plan = metadata.derive(shape, lambda: _plan(metadata, shape))
    # On a CPU float32 is both the precise and the fast arithmetic.
    dtype = mx.float32 if mx.default_device() == mx.cpu else q.dtype
    if sinks is not None:
        sinks = sinks.astype(dtype)
    outputs = []
    for group in plan.groups:
        keys = k_cache.reshape(-1, key_dim)[group.rows].astype(dtype)
        values = v_cache.reshape(-1, value_dim)[group.rows].astype(dtype)
        queries = q[group.tokens].astype(dtype).transpose(0, 2, 1, 3)
        out = _softmax_attention(queries, keys, values, group.visible, scale, softcap, sinks)
        outputs.append(out.transpose(0, 2, 1, 3).flatten(0, 1))
    if plan.num_padding or not outputs:
        outputs.append(mx.zeros((plan.num_padding, q.shape[1], value_dim), dtype))
    result = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
    return (result if plan.order is None else result[plan.order]).astype(q.dtype)


def _softmax_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    visible: mx.array,
    scale: float,
    softcap: float | None,
    sinks: mx.array | None,
) -> mx.array:
    """q [batch, heads, queries, dim], k and v [batch, kv_heads, keys, dim], visible [batch, 1, queries, keys]."""
    if softcap is None:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=visible, sinks=sinks)
    batch, heads, queries, dim = q.shape
    groups = heads // k.shape[1]
    q = q.reshape(batch, -1, groups, queries, dim)
    scores = (q * scale) @ k[:, :, None].swapaxes(-1, -2)
    scores = mx.where(visible[:, :, None], mx.tanh(scores / softcap) * softcap, -mx.inf)
    if sinks is not None:
        sink_column = mx.broadcast_to(sinks.reshape(1, -1, groups, 1, 1), (*scores.shape[:-1], 1))
        scores = mx.concatenate([scores, sink_column], axis=-1)
    weights = mx.softmax(scores, axis=-1, precise=True)[..., : k.shape[2]]
    return (weights @ v[:, :, None]).reshape(batch, heads, queries, -1)


def _plan(metadata: AttentionMetadata, shape: _Shape) -> _Plan:
    """How to compute a step, for layers of this shape."""
    contexts, lengths, starts = metadata.context_lens, metadata.query_lens, metadata.cu_seqlens_q
    groups, row_order = [], []
    for num_queries in np.unique(lengths[(contexts > 0) & (lengths > 0)]):
        seqs = np.nonzero((lengths == num_queries) & (contexts > 0))[0]
        num_keys = contexts if shape.window is None else np.minimum(contexts, num_queries + shape.window - 1)
        for members in _similar_lengths(seqs, num_keys, _MAX_BYTES // (4 * shape.num_kv_heads * shape.dims)):
            tile = _MAX_BYTES // (4 * shape.num_heads * len(members) * int(num_keys[members].max()))
            for begin in range(0, num_queries, max(1, tile)):
                queries = np.arange(begin, min(begin + max(1, tile), num_queries))
                groups.append(_group(metadata, shape, members, queries))
                row_order.append((starts[members, None] + queries).ravel())
    padding = [np.arange(starts[i], starts[i + 1]) for i in np.nonzero(contexts == 0)[0]]
    order = np.concatenate([*row_order, *padding]) if row_order or padding else np.zeros(0, np.int32)
    in_order = bool((order == np.arange(len(order))).all())
    return _Plan(groups, None if in_order else mx.array(np.argsort(order).astype(np.int32)), sum(map(len, padding)))


def _group(metadata: AttentionMetadata, shape: _Shape, seqs: np.ndarray, queries: np.ndarray) -> _Group:
    """The given queries of each sequence, and the keys that they see."""
    contexts = metadata.context_lens[seqs, None]
    query_positions = contexts - metadata.query_lens[seqs, None] + queries  # [num_seqs, num_queries]
    first = np.zeros_like(contexts)
    if shape.window is not None:
        first = np.maximum(query_positions[:, :1] + 1 - shape.window, 0)
    last = query_positions[:, -1:]
    positions = first + np.arange(int((last - first).max()) + 1)  # [num_seqs, num_keys]
    distance = query_positions[:, :, None] - positions[:, None]
    visible = distance >= 0
    if shape.window is not None:
        visible &= distance < shape.window
    positions = np.minimum(positions, last)
    block_ids = np.take_along_axis(metadata.block_tables[seqs], positions // shape.block_size, axis=1)
    slots = block_ids.astype(np.int64) * shape.block_size + positions % shape.block_size
    rows = slots[:, None] * shape.num_kv_heads + np.arange(shape.num_kv_heads)[:, None]
    index_type = np.int32 if rows.max() < 2**31 else np.int64
    tokens = metadata.cu_seqlens_q[seqs, None] + queries
    return _Group(
        mx.array(tokens.astype(np.int32)), mx.array(rows.astype(index_type)), mx.array(visible[:, None])
    )


def _similar_lengths(seqs: np.ndarray, num_keys: np.ndarray, max_keys: int) -> list[np.ndarray]:
    """Split sequences into groups whose longest is at most twice the shortest; padded, a group has `max_keys`."""
    groups: list[np.ndarray] = []
    by_length = seqs[np.argsort(num_keys[seqs], kind="stable")]
    begin = 0
    for end in range(1, len(by_length) + 1):
        longest = num_keys[by_length[end]] if end < len(by_length) else None
        if (
            longest is None
            or longest > max(128, 2 * num_keys[by_length[begin]])
            or longest * (end + 1 - begin) > max_keys
        ):
            groups.append(np.sort(by_length[begin:end]))
            begin = end
    return groups
