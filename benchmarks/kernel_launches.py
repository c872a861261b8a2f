"""Launches of Metal's kernels in the simulator for kernel_traffic.py: their arrays, and what they moved."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from report import Row

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from metalsim import simulator
from metalsim.report import LINE_BYTES, LaunchReport

from mlx_paged.attention.metal import MetalBackend
from mlx_paged.attention.work_items import Shape, decode_layout
from mlx_paged.cache.kv_cache import LayerPool
from mlx_paged.cache.layer_spec import LayerSpec

METAL = MetalBackend()
DTYPE = mx.float16


class Heads(NamedTuple):
    """Query heads, KV heads, and the size of each."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def shape(self) -> Shape:
        return Shape(self.num_kv_heads, self.num_heads // self.num_kv_heads, self.head_dim, self.head_dim, DTYPE.size)

    def kv_bytes(self, num_keys: int) -> int:
        """K and V of so many keys, all KV heads together."""
        return 2 * num_keys * self.num_kv_heads * self.head_dim * DTYPE.size

    def as_columns(self) -> Row:
        return {"heads": f"{self.num_heads}/{self.num_kv_heads}", "head_dim": self.head_dim}


def register_words(shape: Shape) -> int:
    """What a thread of paged_decode keeps, in words of 32 bits: as its body declares it, without addresses."""
    heads, lanes, width, batch, _ = decode_layout(shape)
    of_key, of_value = (-(-dim // (width * lanes)) * width for dim in (shape.head_dim, shape.value_dim))
    query, row = heads * of_key * shape.element_size // 4, max(of_key, of_value) * shape.element_size // 4
    rest = heads * of_value + heads + 2  # output; scores; peak and total
    if shape.codes is not None:
        row = -(-max(of_key * shape.codes.keys.bits, of_value * shape.codes.values.bits) // 32)
        loads, params = of_key // width, -(-shape.element_size * shape.codes.keys.num_params // 4)
        rest += heads * loads + (batch * loads + 1) * params  # sums of queries; parameters of K's rows, and as loaded
    return query + batch * (row + 1) + rest  # rows under way, and their sums


class Arrays(NamedTuple):
    """The arguments of a kernel for one KV head; the blocks of a sequence are scattered."""

    q: mx.array
    pool: LayerPool
    block_tables: mx.array


def make_arrays(
    heads: Heads, batch: int, context: int, num_queries: int, block_size: int, kv_cache_dtype: str | None = None
) -> Arrays:
    per_sequence = -(-context // block_size)
    block_ids = np.random.default_rng(0).permutation(batch * per_sequence).astype(np.int32)
    group, head_dim = heads.shape.heads_per_kv_head, heads.head_dim
    q = mx.random.normal((batch * num_queries, group, head_dim), DTYPE)
    shape = len(block_ids), block_size, 1, head_dim
    pool = LayerPool({name: mx.random.normal(shape, DTYPE) for name in "kv"})
    if kv_cache_dtype is not None:
        slots, rows = (
            mx.array(np.indices(shape[:2]).reshape(2, -1)),
            [each.flatten(0, 1) for each in pool.arrays.values()],
        )
        pool = LayerPool.zeros(LayerSpec(1, head_dim, head_dim, DTYPE).quantised(kv_cache_dtype), *shape[:2])
        pool.write(*slots, *rows)
    return Arrays(q, pool, mx.array(block_ids.reshape(batch, per_sequence)))


def launches(run: Callable[[], Any]) -> list[LaunchReport]:
    """The reports of the kernels that `run` launches. Raises SimulationError if anything is wrong with one."""
    simulator.reset()
    with (
        patch.object(mx.fast, "metal_kernel", simulator.metal_kernel),
        patch.object(mx.metal, "is_available", lambda: True),
    ):
        run()
    return list(simulator.reports)


def counts(reports: list[LaunchReport], heads: Heads, kv_bytes: int, num_keys: int) -> Row:
    """What the launches of one KV head moved. kv_bytes, num_keys: the compulsory ones of all KV heads, and of one.

    read and lines: bytes of K and V asked for, and 128-byte lines, over the compulsory ones. distinct: of these bytes,
    each once; in a decode no two threadgroups have one in common, so that many come to threadgroups from outside, if
    what a simdgroup has read is still in the core's cache when its neighbours ask for it. partial: bytes of partial
    results written and read again, over those of K and V. Barriers and simdgroup functions are those of all
    threadgroups and simdgroups, for each key.
    """
    main, merges = reports[0].traffic, [merge.traffic for merge in reports[1:]]
    assert main is not None
    of_one_head = kv_bytes // heads.num_kv_heads
    kinds = ("cache", "codes", "params")
    caches = [main.buffers[name] for name in (f"{of}_{kind}" for of in "kv" for kind in kinds) if name in main.buffers]
    written = sum(main.buffers[name].bytes_written for name in ("out", "lse")) if merges else 0
    read_again = sum(merge.buffers[name].bytes_read for merge in merges if merge for name in ("parts", "lse"))
    return {
        "threadgroups": main.threadgroups * heads.num_kv_heads,
        "kv_bytes": kv_bytes,
        "distinct": sum(cache.distinct_bytes_read for cache in caches) / of_one_head,
        "read": sum(cache.bytes_read for cache in caches) / of_one_head,
        "lines": sum(cache.lines_read for cache in caches) * LINE_BYTES / of_one_head,
        "partial": (written + read_again) / of_one_head,
        "barriers": main.barriers / num_keys,
        "simdgroup_functions": main.collectives / num_keys,
        "threadgroup_memory": main.threadgroup_memory,
    }
