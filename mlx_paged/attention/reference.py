"""Paged attention in plain MLX operations: runs on any device, and is what the kernels are measured against.

What is computed together, and in which pieces, is decided once per step in `reference_plan`.

K and V are gathered a row of one head at a time, straight into the order that the matrix products want: on a CPU
gathering whole blocks and then transposing takes five times as long.

On a CPU decodes over float32 keys gather values alone: MLX's `gather_mm` multiplies queries with keys where they lie. A
block is a matrix [block_size, num_kv_heads * dim], so a query goes in with zeros in the place of the other heads. That
multiplies num_kv_heads times as often and still is faster, up to 8 of them: memory is what this waits for.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import mlx.core as mx

from mlx_paged.attention.backend import AttentionOptions, Backend
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.attention.reference_plan import Blocks, Chunks, Decodes, Merge, Prompts, Shape, SharedKeys, make_plan
from mlx_paged.cpu.exponential import exp, exp_is_slow

_LEAST_FOR_OWN_EXP = 8192  # scores: with fewer its operations cost more than they save


class _Rows(NamedTuple):
    """The caches as [-1, dim]."""

    k: mx.array
    v: mx.array


class ReferenceBackend(Backend):
    """Plain MLX operations."""

    name = "reference"

    def is_available(self) -> bool:
        return True

    def attend(
        self,
        q: mx.array,
        k_cache: mx.array,
        v_cache: mx.array,
        metadata: AttentionMetadata,
        options: AttentionOptions,
        write_done: mx.array | None = None,
    ) -> mx.array:
        return attend(q, k_cache, v_cache, metadata, options)


def attend(
    q: mx.array, k_cache: mx.array, v_cache: mx.array, metadata: AttentionMetadata, options: AttentionOptions
) -> mx.array:
    scale, window, softcap, sinks = options
    _, block_size, num_kv_heads, key_dim = k_cache.shape
    num_heads, value_dim = q.shape[1], v_cache.shape[3]
    scale = scale if softcap is None else scale / softcap
    shape = Shape(block_size, num_kv_heads, num_heads, key_dim + value_dim, window, scale, k_cache.dtype)
    plan = metadata.plan_once(shape, lambda: make_plan(metadata, shape))
    caches = _Rows(k_cache.flatten(0, 2), v_cache.flatten(0, 2))
    outputs = []
    for group in plan.groups:
        compute = _decode if isinstance(group, Decodes) else _prefill
        outputs.append(compute(q, caches, group, scale, softcap, sinks))
    if plan.num_padding or not outputs:
        outputs.append(mx.zeros((plan.num_padding, num_heads, value_dim), q.dtype))
    result = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
    return result if plan.order is None else result[plan.order]


def _decode(
    q: mx.array, caches: _Rows, group: Decodes, scale: float, softcap: float | None, sinks: mx.array | None
) -> mx.array:
    """q [num_tokens, num_heads, dim] -> [num_seqs, num_heads, value_dim]."""
    num_heads, dim = q.shape[1:]
    queries = q if group.tokens is None else q[group.tokens]
    queries = queries.astype(mx.float32).reshape(-1, group.num_kv_heads, num_heads // group.num_kv_heads, dim)
    results = [_attend_chunks(queries, caches, chunks, scale, softcap) for chunks in group.parts]
    out, log_total = results[0]
    if len(results) > 1:
        out, log_total = (mx.concatenate(list(halves)) for halves in zip(*results, strict=True))
    if group.merge is not None or sinks is not None:
        if group.shared:
            parts = [_attend_shared(q, caches, shared, scale, softcap) for shared in group.shared]
            out = mx.concatenate([out, *(out for out, _ in parts)])
            log_total = mx.concatenate([log_total, *(total for _, total in parts)])
        out = _merged(out, log_total, group.merge, sinks)
    return out.reshape(-1, num_heads, caches.v.shape[1]).astype(q.dtype)


def _attend_chunks(
    queries: mx.array, caches: _Rows, chunks: Chunks, scale: float, softcap: float | None
) -> tuple[mx.array, mx.array]:
    """The results over chunks and the logs of their totals, both [num_chunks, kv_heads, heads / kv_heads, -1]."""
    with nullcontext() if chunks.stream is None else mx.stream(chunks.stream):
        queries = queries[chunks.span]
        if chunks.blocks is None:
            scores = _scores(queries, caches.k[chunks.rows], chunks.bias, scale, softcap)
        else:
            scores = _scores_in_blocks(queries, caches.k, chunks.blocks, softcap)
        return _average(scores, caches.v[chunks.rows].astype(mx.float32))


def _attend_shared(
    q: mx.array, caches: _Rows, shared: SharedKeys, scale: float, softcap: float | None
) -> tuple[mx.array, mx.array]:
    """The results over shared keys and the logs of their totals, both [num_members, kv_heads, heads / kv_heads, -1].

    All members' queries of a KV head are rows of one product.
    """
    num_kv_heads, num_members = shared.rows.shape[0], shared.tokens.shape[0]
    queries = q[shared.tokens].astype(mx.float32).reshape(num_members, num_kv_heads, -1, q.shape[2])
    queries = queries.swapaxes(0, 1).flatten(1, 2)
    scores = _scores(queries, caches.k[shared.rows], mx.zeros((1, 1, 1)), scale, softcap)
    results = _average(scores, caches.v[shared.rows].astype(mx.float32))
    out, log_total = (array.reshape(num_kv_heads, num_members, -1, array.shape[2]) for array in results)
    return out.swapaxes(0, 1), log_total.swapaxes(0, 1)


def _scores(queries: mx.array, keys: mx.array, bias: mx.array, scale: float, softcap: float | None) -> mx.array:
    """[..., rows, keys]; queries: float32 [..., rows, dim], keys: [..., keys, dim]."""
    keys = keys.astype(mx.float32).swapaxes(-1, -2)
    if softcap is None:
        return mx.addmm(bias, queries, keys, alpha=scale)
    return mx.tanh((queries * scale) @ keys) * softcap + bias


def _scores_in_blocks(queries: mx.array, keys: mx.array, blocks: Blocks, softcap: float | None) -> mx.array:
    """queries [num_chunks, kv_heads, heads / kv_heads, dim] -> [num_chunks, kv_heads, heads / kv_heads, chunk_size].

    Where a chunk has no key anything may have been read, NaN included, and the score is -inf.
    """
    num_chunks, num_kv_heads, num_grouped, dim = queries.shape
    chunk_size, num_blocks = blocks.visible.shape[3], blocks.chunks.shape[1]
    spread = (mx.expand_dims(queries, 3) * blocks.own_head).reshape(num_chunks, -1, num_kv_heads * dim)
    keys = keys.reshape(-1, chunk_size // num_blocks, num_kv_heads * dim).swapaxes(1, 2)
    scores = mx.gather_mm(spread, keys, blocks.chunks, blocks.block_ids)
    scores = scores.swapaxes(1, 2).reshape(num_chunks, num_kv_heads, num_grouped, chunk_size)
    if softcap is not None:
        scores = mx.tanh(scores) * softcap
    return mx.where(blocks.visible, scores, -mx.inf)


def _average(scores: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
    """The mean of values [..., keys, dim] weighed by exp(scores), and the logs of the sums of exp(scores), [..., 1].

    scores: float32 [..., rows, keys]. Weights are of the values' dtype, the logs float32.
    """
    top = scores.max(axis=-1, keepdims=True)
    if exp_is_slow() and scores.size >= _LEAST_FOR_OWN_EXP:
        weights = exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        return weights.astype(values.dtype) @ values / total, top + mx.log(total)
    weights = mx.softmax(scores, axis=-1, precise=True)
    log_total = top - mx.log(weights.max(axis=-1, keepdims=True))  # no second pass of exp
    return weights.astype(values.dtype) @ values, log_total


def _merged(out: mx.array, log_total: mx.array, merge: Merge | None, sinks: mx.array | None) -> mx.array:
    """The mean over each sequence's chunks, weighed by exp(log_total); a sink is one more chunk, of zeros.

    out: [num_chunks, kv_heads, heads / kv_heads, value_dim] -> [num_seqs, kv_heads, heads / kv_heads, 1, value_dim].
    """
    if merge is None:
        out, log_total = out[:, None], log_total[:, None]
    else:
        out, log_total = out[merge.chunks], log_total[merge.chunks] + merge.bias
    out, log_total = out.transpose(0, 2, 3, 1, 4), log_total.transpose(0, 2, 3, 4, 1)
    if sinks is None:
        return mx.softmax(log_total, axis=-1) @ out
    sink = sinks.astype(mx.float32).reshape(1, *log_total.shape[1:3], 1, 1)
    log_total = mx.concatenate([log_total, mx.broadcast_to(sink, (*log_total.shape[:4], 1))], axis=-1)
    return mx.softmax(log_total, axis=-1)[..., :-1] @ out


def _prefill(
    q: mx.array, caches: _Rows, group: Prompts, scale: float, softcap: float | None, sinks: mx.array | None
) -> mx.array:
    """q [num_tokens, num_heads, dim] -> [num_seqs * num_queries, num_heads, value_dim]."""
    # On a CPU float32 is both the precise and the fast arithmetic.
    dtype = mx.float32 if mx.default_device() == mx.cpu else q.dtype
    queries = q[group.tokens].astype(dtype).transpose(0, 2, 1, 3)
    sinks = None if sinks is None else sinks.astype(dtype)
    k, v = (cache[group.rows].astype(dtype) for cache in caches)
    if softcap is None and not exp_is_slow():
        out = mx.fast.scaled_dot_product_attention(queries, k, v, scale=scale, mask=group.visible, sinks=sinks)
    else:
        out = _prompt_attention(queries, k, v, group.visible, scale, softcap, sinks)
    return out.transpose(0, 2, 1, 3).flatten(0, 1).astype(q.dtype)


def _prompt_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    visible: mx.array,
    scale: float,
    softcap: float | None,
    sinks: mx.array | None,
) -> mx.array:
    """q [batch, heads, queries, dim], k and v [batch, kv_heads, keys, dim], visible [batch, 1, queries, keys]."""
    batch, heads, queries, dim = q.shape
    num_kv_heads, keys = k.shape[1:3]
    q = (q * scale).reshape(batch, num_kv_heads, -1, dim)
    scores = (q @ k.swapaxes(-1, -2)).astype(mx.float32).reshape(batch, heads, queries, keys)
    if softcap is not None:
        scores = mx.tanh(scores) * softcap
    scores = scores + mx.where(visible, 0.0, -mx.inf)
    out, log_total = _average(scores.reshape(batch, num_kv_heads, -1, keys), v)
    out = out.reshape(batch, heads, queries, -1)
    if sinks is None:
        return out
    return out * mx.sigmoid(log_total.reshape(batch, heads, queries, 1) - sinks.reshape(1, -1, 1, 1)).astype(out.dtype)
