"""The reference backend with what makes it faster on MLX's CPU build, where it is the default.

Prompts are computed in tiles whose scores stay in the processor's cache. Scores take exponentials of our own where MLX
computes them one by one. Keys that decodes share are read once, as keys of one sequence with all members' queries.
Those of many decodes are multiplied where they lie (32 decodes over 250 to 350 keys: attention alone takes 1.3 times
as long without).

CPU time of a whole run of a model of 135 million parameters without one of them, as a ratio (AMD Zen 3, OpenBLAS on
one thread, +-5%; "=": nothing changes; in brackets attention alone):

    without           W1    W2    W4, 256   W4, none   W5,        W5,      W4, 1,024
                                  shared    shared     samples    beams    shared
    own exponentials  1.03  1.04  1.09      1.03       1.00       1.00     [1.26]
    prompt tiles      =     =     1.01      1.10       =          =        [1.62]
    shared prefixes   =     =     =         =          =          =        [1.68]
"""

from __future__ import annotations

import functools

import mlx.core as mx
import numpy as np

from mlx_paged.attention.backend import AttentionOptions, in_order
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.attention.reference import MAX_BYTES, ReferenceBackend, Tile, by_token, rows_of
from mlx_paged.cache.kv_cache import LayerPool
from mlx_paged.cpu.exponential import exp, exp_is_slow

_CACHED_BYTES = 2 << 20  # of scores
_MIN_TILE = 16  # queries: with fewer the products are too small
_MIN_OWN_EXP = 8192  # scores: with fewer its operations cost more than they save
MIN_SAVED = 4096  # keys that are not read again: a prefix costs some twenty operations in each layer
_MAX_PREFIXES = 4
_MIN_KEYS_IN_PLACE = 1024  # of a batch of decodes: with fewer, gathering them costs no more
_MAX_HEADS_IN_PLACE = 8


class CpuBackend(ReferenceBackend):
    """Plain MLX operations as a CPU likes them."""

    name = "cpu"

    def is_available(self) -> bool:
        return bool(mx.default_device() == mx.cpu)

    def tile_queries(self, bytes_per_query: int) -> int:
        return min(super().tile_queries(bytes_per_query), max(_MIN_TILE, _CACHED_BYTES // bytes_per_query))

    def average(self, scores: mx.array, values: mx.array, sinks: mx.array | None) -> mx.array:
        if not exp_is_slow() or scores.size < _MIN_OWN_EXP:
            return super().average(scores, values, sinks)
        return _average_and_total(scores, values, sinks)[0]

    def products(self, queries: mx.array, pool: LayerPool, tile: Tile) -> mx.array:
        """Of decodes with float32 keys: with whole blocks where they lie, [block_size, num_kv_heads * dim] each.

        A query has zeros in the place of the other heads. That multiplies num_kv_heads times as often and still is
        faster, up to some number of them: memory is what this waits for.
        """
        num_seqs, num_kv_heads, num_keys = tile.rows.shape
        if tile.block_ids is None or pool.codes is not None or pool.dtype != mx.float32:
            return super().products(queries, pool, tile)
        heads = mx.eye(num_kv_heads).reshape(num_kv_heads, 1, num_kv_heads, 1)
        spread = (queries[:, :, :, None] * heads).reshape(num_seqs, -1, num_kv_heads * queries.shape[3])
        seqs = mx.broadcast_to(mx.arange(num_seqs, dtype=mx.uint32)[:, None], tile.block_ids.shape)
        products = mx.gather_mm(spread, pool.keys.flatten(2, 3).swapaxes(1, 2), seqs, tile.block_ids)
        products = products.swapaxes(1, 2).reshape(*queries.shape[:3], -1)[..., :num_keys]
        return mx.where(tile.bias[:, 0] == 0, products, 0)  # what unused slots hold may be NaN

    def plan(
        self,
        metadata: AttentionMetadata,
        num_heads: int,
        pool: LayerPool,
        window: int | None,
        first_keys: np.ndarray | None = None,
    ) -> tuple[list[Tile], mx.array | None]:
        tiles, order = super().plan(metadata, num_heads, pool, window, first_keys)
        block_size, num_kv_heads, *_ = pool.block_shape
        if window is not None or num_kv_heads > _MAX_HEADS_IN_PLACE:
            return tiles, order
        for i, tile in enumerate(tiles):
            if tile.tokens.shape[1] == 1 and tile.rows.size >= num_kv_heads * _MIN_KEYS_IN_PLACE:
                block_ids = tile.rows[:, 0, ::block_size] // (block_size * num_kv_heads)
                tiles[i] = tile._replace(block_ids=block_ids.astype(mx.uint32))
        return tiles, order

    def attend(self, q: mx.array, pool: LayerPool, metadata: AttentionMetadata, options: AttentionOptions) -> mx.array:
        prefixes: list[tuple[np.ndarray, int]] = metadata.plan_once("prefixes", lambda: _worth_sharing(metadata))
        if not prefixes or options.window is not None:
            return super().attend(q, pool, metadata, options)
        plan = functools.partial(self._plan_apart, metadata, prefixes, q.shape[1], pool)
        (tiles, token_order), shared = metadata.plan_once(("apart", *self.plan_key(q, pool)), plan)

        def compute(tile: Tile, options: AttentionOptions) -> list[mx.array]:
            found = _average_and_total(*self.scores(q, pool, tile, options))
            return [by_token(array, tile) for array in found]

        means, totals = map(list, zip(*(compute(tile, options) for tile in tiles), strict=True))
        num_tokens, num_heads = q.shape[:2]
        out = in_order(means, token_order, num_tokens, (num_heads, pool.value_dim), mx.float32)
        log_total = in_order(totals, token_order, num_tokens, (num_heads, 1), mx.float32)
        for tile in shared:
            more, log_more = compute(tile, options._replace(sinks=None))  # a sink is one of a sequence's own keys
            members = tile.tokens[0]
            both = mx.logaddexp(log_total[members], log_more)
            out[members] = out[members] * mx.exp(log_total[members] - both) + more * mx.exp(log_more - both)
            log_total[members] = both
        return out.astype(q.dtype)

    def _plan_apart(
        self, metadata: AttentionMetadata, prefixes: list[tuple[np.ndarray, int]], num_heads: int, pool: LayerPool
    ) -> tuple[tuple[list[Tile], mx.array | None], list[Tile]]:
        """As `plan`, without the prefixes' keys, and tiles of one sequence with those and all members' queries."""
        _, num_kv_heads, *dims = pool.block_shape
        bytes_per_key = 4 * num_kv_heads * sum(dims)
        first_keys, shared = np.zeros_like(metadata.context_lens), []
        for members, num_tokens in prefixes:
            first_keys[members] = num_tokens
            tokens = mx.array(metadata.cu_seqlens_q[members][None])
            size = max(1, MAX_BYTES // (4 * len(members) * num_heads + bytes_per_key))
            for begin in range(0, num_tokens, size):
                positions = mx.arange(begin, min(begin + size, num_tokens), dtype=mx.int32)[None]
                rows = rows_of(metadata, members[:1], positions, pool)
                shared.append(Tile(tokens, rows, mx.zeros((1, 1, 1, 1, 1))))
        return self.plan(metadata, num_heads, pool, None, first_keys), shared


def _average_and_total(scores: mx.array, values: mx.array, sinks: mx.array | None) -> tuple[mx.array, mx.array]:
    """As `average`, and the logs of the sums of exp(scores), [..., num_rows, 1]."""
    top = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        top = mx.maximum(top, sinks)
    weigh = exp if exp_is_slow() else mx.exp
    weights = weigh(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + weigh(sinks - top)
    return weights @ values / total, top + mx.log(total)


def _worth_sharing(metadata: AttentionMetadata) -> list[tuple[np.ndarray, int]]:
    """The prefixes that are computed apart: the numbers of the sequences that share one, and how many tokens it has."""
    if metadata.find_shared_prefixes is None:
        return []
    seqs = np.flatnonzero((metadata.query_lens == 1) & (metadata.context_lens > 0))
    prefixes = sorted(metadata.find_shared_prefixes(seqs), key=lambda prefix: prefix.num_saved, reverse=True)
    return [(seqs[each.members], each.num_tokens) for each in prefixes[:_MAX_PREFIXES] if each.num_saved >= MIN_SAVED]
