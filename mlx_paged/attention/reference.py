"""Attention over blocks in plain MLX operations: what every kernel must compute, and the fallback on any device.

    scores = softcap * tanh(q . k * scale / softcap)         (without a softcap: q . k * scale)
    out    = sum(exp(scores) * v) / (sum(exp(scores)) + exp(sink))

over the keys of the query's sequence up to the query's own position, of which a window leaves the last ones.

A decode is a prompt of one query. Sequences with equally many queries and similar contexts are one batch, whose keys
and values are gathered from the blocks; positions past the end of a context stand for its last token again, so that
what unused slots hold, NaN included, is never read. Where the keys are is computed on the device, once per step: the
host handles a few numbers per sequence, however long the contexts.
"""

import functools
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_paged.attention.backend import AttentionOptions, Backend, in_order
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.cache.kv_cache import LayerPool

_NO_WINDOW = 1 << 30
MAX_BYTES = 128 << 20  # of what one operation gathers or scores, but for a single query of a single sequence


class Tile(NamedTuple):
    """Queries that are computed as one batch: num_queries of each of num_seqs sequences."""

    tokens: mx.array
    """int32 [num_seqs, num_queries]: the rows of the queries in q."""
    rows: mx.array
    """int32 [num_seqs, num_kv_heads, num_keys]: the rows of their keys in a pool: `LayerPool.row_numbers`."""
    bias: mx.array
    """float32 [num_seqs, 1, 1, num_queries, num_keys]: 0 for keys that a query sees, otherwise -inf."""
    block_ids: mx.array | None = None
    """uint32 [num_seqs, num_blocks]: where keys are to be read in place, the blocks that they fill."""


class ReferenceBackend(Backend):
    """Plain MLX operations in float32."""

    name = "reference"

    def is_available(self) -> bool:
        return True

    def attend(self, q: mx.array, pool: LayerPool, metadata: AttentionMetadata, options: AttentionOptions) -> mx.array:
        plan = functools.partial(self.plan, metadata, q.shape[1], pool, options.window)
        tiles, token_order = metadata.plan_once((*self.plan_key(q, pool), options.window), plan)
        outputs = []
        for tile in tiles:
            out = by_token(self.average(*self.scores(q, pool, tile, options)), tile)
            outputs.append(out.astype(q.dtype))
        return in_order(outputs, token_order, q.shape[0], (q.shape[1], pool.value_dim), q.dtype)

    def scores(
        self, q: mx.array, pool: LayerPool, tile: Tile, options: AttentionOptions
    ) -> tuple[mx.array, mx.array, mx.array | None]:
        """A tile's scores [num_seqs, num_kv_heads, num_rows, num_keys], values [..., num_keys, dim] and sinks [..., 1].

        The rows of a KV head are the queries of each of its query heads.
        """
        num_seqs, num_kv_heads, num_keys = tile.rows.shape
        by_head = (num_seqs, num_kv_heads, q.shape[1] // num_kv_heads, tile.tokens.shape[1], num_keys)
        scale, _, softcap, sinks = options
        queries = q[tile.tokens].astype(mx.float32).swapaxes(1, 2).reshape(num_seqs, num_kv_heads, -1, q.shape[2])
        scores = self.products(queries * scale, pool, tile)
        if softcap is not None:
            scores = mx.tanh(scores / softcap) * softcap
        scores = (scores.reshape(by_head) + tile.bias).reshape(scores.shape)
        if sinks is not None:
            sinks = mx.broadcast_to(sinks.astype(mx.float32).reshape(1, num_kv_heads, -1, 1, 1), (*by_head[:4], 1))
            sinks = sinks.reshape(*scores.shape[:3], 1)
        return scores, pool.gather("v", tile.rows)[..., : pool.value_dim], sinks

    def products(self, queries: mx.array, pool: LayerPool, tile: Tile) -> mx.array:
        """Of queries [num_seqs, num_kv_heads, num_rows, dim] with a tile's keys."""
        return queries @ pool.gather("k", tile.rows).swapaxes(2, 3)

    def average(self, scores: mx.array, values: mx.array, sinks: mx.array | None) -> mx.array:
        """The mean of values [..., num_keys, dim] with weights exp(scores), [..., num_rows, num_keys].

        A sink, [..., num_rows, 1], counts as the score of one more key whose value is 0.
        """
        if sinks is not None:
            scores = mx.concatenate([scores, sinks], axis=-1)
        weights = mx.softmax(scores, axis=-1, precise=True)
        return weights[..., : values.shape[-2]] @ values

    def tile_queries(self, bytes_per_query: int) -> int:
        """How many queries of a batch are computed at once, given the bytes of their scores."""
        return max(1, MAX_BYTES // bytes_per_query)

    def plan_key(self, q: mx.array, pool: LayerPool) -> tuple[Any, ...]:
        """What a plan depends on, beside the step's metadata and the window."""
        return self.name, q.shape[1], *pool.block_shape

    def plan(
        self,
        metadata: AttentionMetadata,
        num_heads: int,
        pool: LayerPool,
        window: int | None,
        first_keys: np.ndarray | None = None,
    ) -> tuple[list[Tile], mx.array | None]:
        """The tiles of a step, and the row of each token in their outputs, which padding follows. None: in order.

        first_keys: int32 [num_seqs], keys before these are left out.
        """
        _, num_kv_heads, *dims = pool.block_shape
        contexts, query_lens = metadata.context_lens, metadata.query_lens
        window = _NO_WINDOW if window is None else min(window, _NO_WINDOW)
        first_keys = np.zeros_like(contexts) if first_keys is None else first_keys
        max_keys = MAX_BYTES // (4 * num_kv_heads * sum(dims))
        tiles: list[Tile] = []
        tokens: list[np.ndarray] = []
        for num_queries in np.unique(query_lens[query_lens > 0]).tolist():
            seqs = np.flatnonzero((query_lens == num_queries) & (contexts > 0))
            num_keys = np.minimum(contexts - first_keys, num_queries + window - 1)
            for group in _similar_lengths(seqs, num_keys[seqs], max_keys):
                size = self.tile_queries(4 * num_heads * len(group) * int(num_keys[group].max()))
                for begin in range(0, num_queries, size):
                    chunk = np.arange(begin, min(begin + size, num_queries), dtype=np.int32)
                    queries = (contexts - query_lens)[group, None] + chunk  # positions in the sequences
                    first_key = np.maximum(queries[:, :1] + 1 - window, first_keys[group, None])
                    last_key = queries[:, -1:]
                    keys = mx.array(first_key) + mx.arange(int((last_key - first_key).max()) + 1, dtype=mx.int32)
                    distance = mx.array(queries)[:, :, None] - keys[:, None]
                    bias = mx.where((distance >= 0) & (distance < window), 0.0, -mx.inf)[:, None, None]
                    rows = rows_of(metadata, group, mx.minimum(keys, mx.array(last_key)), pool)
                    tokens.append(metadata.cu_seqlens_q[group, None] + chunk)
                    tiles.append(Tile(mx.array(tokens[-1]), rows, bias))
        tokens.append(np.flatnonzero(np.repeat(contexts == 0, query_lens)))
        order = np.concatenate(tokens, axis=None).argsort().astype(np.int32)
        return tiles, None if (order == np.arange(len(order))).all() else mx.array(order)


def by_token(array: mx.array, tile: Tile) -> mx.array:
    """[num_seqs, num_kv_heads, num_rows, dim] of a tile as [num_seqs * num_queries, num_heads, dim]."""
    num_seqs, num_queries = tile.tokens.shape
    return array.reshape(num_seqs, -1, num_queries, array.shape[3]).swapaxes(1, 2).flatten(0, 1)


def rows_of(metadata: AttentionMetadata, seqs: np.ndarray, positions: mx.array, pool: LayerPool) -> mx.array:
    """Where the pool has the keys at `positions`, [n, num_keys], of `seqs`, [n]: see `LayerPool.row_numbers`."""
    block, offset = mx.divmod(positions, pool.block_shape[0])
    block_ids = metadata.block_tables[mx.array(seqs[:, None].astype(np.int32)), block]
    return pool.row_numbers(block_ids, offset)


def _similar_lengths(seqs: np.ndarray, num_keys: np.ndarray, max_keys: int) -> list[np.ndarray]:
    """Split sequences into groups whose longest is at most twice the shortest (or 128 keys, if that is more).

    Were all as long as its longest, a group would have at most `max_keys` keys.
    """
    order = np.argsort(num_keys, kind="stable")
    lengths, groups, begin = num_keys[order].tolist(), [], 0
    for end in range(1, len(order) + 1):
        is_last = end == len(order)
        if is_last or lengths[end] > 2 * max(64, lengths[begin]) or lengths[end] * (end + 1 - begin) > max_keys:
            groups.append(np.sort(seqs[order[begin:end]]))
            begin = end
    return groups
