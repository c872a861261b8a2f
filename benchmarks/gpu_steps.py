"""Steps of attention on a card for on_a_gpu.py: their arrays, how long they take, and how far they are from float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from attention_layers import Contender, dense_attention, measure

from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.cuda import CudaBackend
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.cache.kv_cache import LayerPool
from mlx_paged.cache.layer_spec import LayerSpec

BLOCK_SIZE = 16
CUDA = CudaBackend()


def seconds(function: Callable[[mx.array], mx.array], x: mx.array, quick: bool) -> float:
    """Of one call. Each call has the result of the one before, or MLX could run several at once."""
    return measure({"it": Contender(x, lambda y, _: function(y))}, quick)["it"]


class Step(NamedTuple):
    """The arrays of a step's attention."""

    q: mx.array
    pool: LayerPool
    metadata: AttentionMetadata

    def attend(self) -> mx.array:
        return CUDA.attend(*self, AttentionOptions(self.q.shape[2] ** -0.5))

    def attend_with(self, q: mx.array) -> mx.array:
        return self._replace(q=q).attend()


def make_step(
    batch: int, context: int, num_queries: int, heads: tuple[int, int], head_dim: int, dtype: mx.Dtype
) -> Step:
    """`batch` sequences with so many queries and tokens of context each; their blocks lie in random order."""
    rng = np.random.default_rng(0)
    blocks = -(-context // BLOCK_SIZE)
    tables = mx.array(rng.permutation(batch * blocks).reshape(batch, blocks).astype(np.int32))
    shape = batch * blocks, BLOCK_SIZE, heads[1], head_dim
    pool = LayerPool({name: mx.random.normal(shape).astype(dtype) for name in "kv"})
    q = mx.random.normal((batch * num_queries, heads[0], head_dim)).astype(dtype)
    mx.eval(q, pool.arrays, tables)
    starts = np.arange(batch + 1, dtype=np.int32) * num_queries
    return Step(q, pool, AttentionMetadata(tables, np.full(batch, context, np.int32), starts))


def slots_of(block_ids: mx.array, offsets: mx.array) -> AttentionMetadata:
    """Metadata that tells where new keys and values go, and nothing else."""
    nothing = np.zeros(0, np.int32)
    return AttentionMetadata(mx.array(nothing), nothing, nothing, slot_block_ids=block_ids, slot_offsets=offsets)


def name_of(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def step_at_the_end_of_a_pool(num_elements: int) -> Step:
    """A decode over the last blocks of a pool with more elements than that; all of their slots are written first."""
    heads, head_dim, num_blocks = (8, 2), 64, 5
    block = BLOCK_SIZE * heads[1] * head_dim
    first = -(-num_elements // block)
    pool = LayerPool.zeros(LayerSpec(heads[1], head_dim, head_dim, mx.bfloat16), first + num_blocks, BLOCK_SIZE)
    slots = np.arange(num_blocks * BLOCK_SIZE, dtype=np.int32)
    where = mx.array(first + slots // BLOCK_SIZE), mx.array(slots % BLOCK_SIZE)
    new = [mx.random.normal((len(slots), heads[1], head_dim)).astype(mx.bfloat16) for _ in "kv"]
    CUDA.write(pool, slots_of(*where), *new)
    mx.eval(pool.write_done)
    q = mx.random.normal((1, heads[0], head_dim)).astype(mx.bfloat16)
    tables, context = mx.arange(first, first + num_blocks, dtype=mx.int32)[None], np.array([len(slots)], np.int32)
    return Step(q, pool, AttentionMetadata(tables, context, np.array([0, 1], np.int32)))


def relative_error(step: Step) -> float:
    """Of the attention of one sequence, against float64."""
    (context,), num_queries = step.metadata.context_lens, step.q.shape[0]
    blocks = step.metadata.block_tables[0]
    contents = [cache[blocks].flatten(0, 1)[: int(context)] for cache in step.pool.arrays.values()]
    arrays = (step.attend(), step.q, *contents)
    found, *inputs = (np.array(array.astype(mx.float32)).astype(np.float64) for array in arrays)
    expected = dense_attention(*inputs, positions=np.arange(context - num_queries, context))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
