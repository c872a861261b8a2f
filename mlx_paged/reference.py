"""Paged attention in plain MLX operations: runs on any device, and is what the kernels are measured against.

Sequences that decode are batched: those of similar context length are gathered together, so a batch costs a few
operations however many sequences it has. A sequence with several queries is taken by itself, in tiles of queries, and
without copying K and V where its blocks happen to be consecutive. Scores and gathered blocks of one operation stay
under `_MAX_BYTES`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

if TYPE_CHECKING:
    from mlx_paged.attention import AttentionMetadata

_MAX_BYTES = 128 << 20


class _DecodeGroup(NamedTuple):
    """Sequences with one query each and contexts of similar length."""

    tokens: mx.array  # int32 [num_seqs]: their queries' rows in q
    blocks: mx.array  # int32 [num_seqs, num_blocks]
    visible: mx.array  # bool [num_seqs, num_blocks * block_size]


class _PrefillTile(NamedTuple):
    """Consecutive queries of one sequence."""

    first_token: int
    num_tokens: int
    blocks: mx.array | None  # int32 [num_blocks]; None where they are consecutive, from first_block
    first_block: int
    num_blocks: int
    num_keys: int  # keys from the start of the first block on; the rest of the last block is not the sequence's
    visible: mx.array  # bool [num_tokens, num_keys]


class _Plan(NamedTuple):
    decode: list[_DecodeGroup]
    prefill: list[_PrefillTile]
    order: mx.array | None  # int32 [num_tokens]: q's row -> row of the groups' outputs, None if they are the same
    num_padding: int  # tokens of sequences without context


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
    block_size, num_heads = k_cache.shape[1], q.shape[1]
    kv_bytes = k_cache.shape[2] * (k_cache.shape[3] + v_cache.shape[3]) * 4
    key = ("reference", block_size, window, num_heads, kv_bytes)
    plan = metadata.derive(key, lambda: _plan(metadata, block_size, window, num_heads, kv_bytes))
    # On a CPU float32 is both the precise and the fast arithmetic.
    dtype = mx.float32 if mx.default_device() == mx.cpu else q.dtype
    if sinks is not None:
        sinks = sinks.astype(dtype)
    outputs = []
    for group in plan.decode:
        keys, values = (cache[group.blocks].flatten(1, 2).astype(dtype) for cache in (k_cache, v_cache))
        values = mx.where(group.visible[:, :, None, None], values, 0)  # 0 * NaN of an unused slot would be NaN
        queries = q[group.tokens].astype(dtype)[:, :, None]
        out = _softmax_attention(queries, keys, values, group.visible[:, None, None], scale, softcap, sinks)
        outputs.append(out[:, :, 0])
    for tile in plan.prefill:
        keys, values = (_blocks_of(tile, cache)[None].astype(dtype) for cache in (k_cache, v_cache))
        queries = q[tile.first_token : tile.first_token + tile.num_tokens].astype(dtype)
        queries = queries.transpose(1, 0, 2)[None]
        out = _softmax_attention(queries, keys, values, tile.visible[None, None], scale, softcap, sinks)
        outputs.append(out[0].transpose(1, 0, 2))
    if plan.num_padding or not outputs:
        outputs.append(mx.zeros((plan.num_padding, num_heads, v_cache.shape[3]), dtype))
    result = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
    return (result if plan.order is None else result[plan.order]).astype(q.dtype)


def _blocks_of(tile: _PrefillTile, cache: mx.array) -> mx.array:
    """The tile's keys or values, [num_keys, num_kv_heads, dim]: a view where the blocks are consecutive."""
    if tile.blocks is None:
        blocks = cache[tile.first_block : tile.first_block + tile.num_blocks]
    else:
        blocks = cache[tile.blocks]
    return blocks.flatten(0, 1)[: tile.num_keys]


def _softmax_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    visible: mx.array,
    scale: float,
    softcap: float | None,
    sinks: mx.array | None,
) -> mx.array:
    """q [batch, heads, queries, dim], k and v [batch, keys, kv_heads, dim], visible broadcast over the scores."""
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
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


def _plan(
    metadata: AttentionMetadata, block_size: int, window: int | None, num_heads: int, kv_bytes: int
) -> _Plan:
    """How to compute a step, for layers with this window; `kv_bytes` is what K and V take per key."""
    contexts, lengths, starts = metadata.context_lens, metadata.query_lens, metadata.cu_seqlens_q
    decode, prefill = [], []
    rows = []  # of q, in the order in which the groups give their outputs
    # Positions before the first visible one are never read: they may be long released.
    first_visible = np.maximum(contexts - lengths + 1 - window, 0) if window else np.zeros_like(contexts)
    first_block = first_visible // block_size
    num_blocks = -(-contexts // block_size) - first_block
    seqs = np.nonzero((lengths == 1) & (contexts > 0))[0]
    for group in _similar_lengths(seqs, num_blocks, max_blocks=max(1, _MAX_BYTES // (kv_bytes * block_size))):
        columns = first_block[group, None] + np.arange(num_blocks[group].max())
        # Beyond its context a sequence reads its last block again: always a block of its own.
        columns = np.minimum(columns, (-(-contexts[group] // block_size) - 1)[:, None])
        blocks = metadata.block_tables[group[:, None], columns]
        positions = first_block[group, None] * block_size + np.arange(num_blocks[group].max() * block_size)
        visible = (positions < contexts[group, None]) & (positions >= first_visible[group, None])
        tokens = starts[group]
        decode.append(_DecodeGroup(mx.array(tokens), mx.array(blocks), mx.array(visible)))
        rows.append(tokens)
    for i in np.nonzero((lengths > 1) & (contexts > 0))[0]:
        tile_size = max(1, _MAX_BYTES // (4 * num_heads * int(contexts[i])))
        for begin in range(0, lengths[i], tile_size):
            end = min(begin + tile_size, int(lengths[i]))
            queries = contexts[i] - lengths[i] + np.arange(begin, end)
            low = max(0, queries[0] + 1 - window) // block_size if window else 0
            high = -(-(queries[-1] + 1) // block_size)
            keys = np.arange(low * block_size, queries[-1] + 1)
            visible = keys <= queries[:, None]
            if window:
                visible &= keys > queries[:, None] - window
            ids = metadata.block_tables[i, low:high]
            consecutive = bool((np.diff(ids) == 1).all())
            blocks = None if consecutive else mx.array(ids)
            first = int(starts[i]) + begin
            prefill.append(
                _PrefillTile(first, end - begin, blocks, int(ids[0]), len(ids), len(keys), mx.array(visible))
            )
            rows.append(np.arange(first, first + end - begin))
    padding = [np.arange(starts[i], starts[i + 1]) for i in np.nonzero(contexts == 0)[0]]
    row_order = np.concatenate([*rows, *padding]) if rows or padding else np.zeros(0, np.int32)
    order = None
    if (row_order != np.arange(len(row_order))).any():
        order = mx.array(np.argsort(row_order).astype(np.int32))
    return _Plan(decode, prefill, order, sum(map(len, padding)))


def _similar_lengths(seqs: np.ndarray, num_blocks: np.ndarray, max_blocks: int) -> list[np.ndarray]:
    """Split sequences into groups whose longest is at most twice the shortest; padded, a group has `max_blocks`."""
    groups: list[np.ndarray] = []
    by_length = seqs[np.argsort(num_blocks[seqs], kind="stable")]
    begin = 0
    for end in range(1, len(by_length) + 1):
        longest = num_blocks[by_length[end]] if end < len(by_length) else None
        if (
            longest is None
            or longest > max(8, 2 * num_blocks[by_length[begin]])
            or longest * (end + 1 - begin) > max_blocks
        ):
            groups.append(np.sort(by_length[begin:end]))
            begin = end
    return groups
