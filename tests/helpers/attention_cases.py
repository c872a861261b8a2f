"""Attention over a paged cache as tests pose it: random cases, float64 results, how close is close enough."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from mlx_paged import paged_attention
from mlx_paged.attention import found_at_load, work_items
from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.attention.paged_attention import BACKENDS
from mlx_paged.attention.shared_prefix import SharedPrefix, find_shared_prefixes
from mlx_paged.cache.kv_cache import LayerPool
from mlx_paged.cache.layer_spec import LayerSpec

if TYPE_CHECKING:
    from helpers.gpu import Gpu

#: With 16 tokens, 2 heads and 128 dimensions it is 2**32 pieces of 16 bytes away: a 32-bit offset, counted in whatever
#: unit, would be that of block 0.
FAR_BLOCK = 1 << 23
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

#: MLX_PAGED_LONG_TESTS=1 runs every point of the grids (days on a CPU) instead of a cover of all pairs.
ALL_POINTS = bool(int(os.environ.get("MLX_PAGED_LONG_TESTS") or 0))


class Case(NamedTuple):
    """A point of a grid.

    lengths: (queries, context) of each sequence; heads: (query, KV) heads; head_dim: that of keys and of values;
    consecutive: whether a sequence's blocks lie side by side; shared: (sequences, blocks), the first blocks of these
    sequences are those of the first one; latent: V is the first part of K; codes: the type that K and V are stored as.
    """

    lengths: Sequence[tuple[int, int]]
    heads: tuple[int, int] = (8, 2)
    head_dim: tuple[int, int] = (64, 64)
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    dtype: str = "float16"
    consecutive: bool = False
    shared: Sequence[tuple[Sequence[int], int]] = ()
    latent: bool = False
    codes: str | None = None


class Arrays(NamedTuple):
    """Random arrays of a case, as `paged_attention` takes them; NaN in every slot that no token has."""

    q: mx.array
    k_cache: mx.array
    v_cache: mx.array
    block_tables: mx.array
    context_lens: np.ndarray
    cu_seqlens_q: np.ndarray
    options: dict[str, Any]
    latent: bool = False
    quantised: LayerPool | None = None
    """With the K and V above, which are then float32, as codes."""

    @property
    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """As plans take them."""
        return self.context_lens, self.cu_seqlens_q

    @property
    def pool(self) -> LayerPool:
        """As a layer has its K and V."""
        if self.quantised is not None:
            return self.quantised
        if self.latent:
            return LayerPool({"k": self.k_cache}, latent_dim=self.v_cache.shape[3])
        return LayerPool({"k": self.k_cache, "v": self.v_cache})

    def _find_shared(self, seqs: np.ndarray) -> list[SharedPrefix]:
        seen = (self.context_lens - np.diff(self.cu_seqlens_q) + 1)[seqs]
        return find_shared_prefixes(np.array(self.block_tables)[seqs], seen, self.pool.block_shape[0])

    def attend(self, **options: Any) -> mx.array:
        """`paged_attention` of them; of latents and codes, a layer's own affair, by the backend of that name."""
        if self.latent or self.quantised is not None:
            metadata = AttentionMetadata(*self[3:6], self._find_shared)
            return BACKENDS[options["backend"]].attend(self.q, self.pool, metadata, AttentionOptions(**self.options))
        return paged_attention(*self[:6], **self.options, **options)


def found_far(access: str) -> str:
    """What a simulator says of a read or a write of FAR_BLOCK: so far away there may lie a simulated thread's stack."""
    return f"out-of-bounds {access}|another thread's private memory"


def quantised(case: Case, k_cache: mx.array, v_cache: mx.array, unused: np.ndarray) -> LayerPool:
    """These K and V as codes, with NaN for parameters of what no token has."""
    assert case.codes is not None
    layer = LayerSpec(case.heads[1], *case.head_dim, DTYPES[case.dtype]).quantised(case.codes)
    pool = LayerPool.zeros(layer, *unused.shape)
    block_ids, offsets = (mx.array(each.astype(np.int32)) for each in np.nonzero(~unused))
    pool.write(block_ids, offsets, k_cache[block_ids, offsets], v_cache[block_ids, offsets])
    for name, array in pool.arrays.items():
        if name.endswith("params"):
            shape = (unused.shape[0], 1, unused.shape[1], 1, 1)
            pool.arrays[name] = mx.where(mx.array(unused.reshape(shape)), mx.array(np.nan, array.dtype), array)
    return pool


def make_arrays(case: Case, seed: int = 0) -> Arrays:
    """The arrays of a case. Entries of tables that name no block are -1, and so is at least one of each."""
    rng = np.random.default_rng(seed)
    dtype = DTYPES[case.dtype]
    query_lens, context_lens = np.array(case.lengths, np.int32).T
    num_heads, num_kv_heads = case.heads
    blocks_of = -(-context_lens // case.block_size)
    num_blocks = int(blocks_of.sum()) + 3
    block_ids = np.arange(num_blocks) if case.consecutive else rng.permutation(num_blocks)
    tables = np.full((len(blocks_of), max(8, int(blocks_of.max()) + 1)), -1, np.int32)
    caches = [rng.standard_normal((num_blocks, case.block_size, num_kv_heads, dim)) for dim in case.head_dim]
    unused = np.ones((num_blocks, case.block_size), bool)
    for table, count in zip(tables, blocks_of, strict=True):
        table[:count], block_ids = block_ids[:count], block_ids[count:]
    for members, count in case.shared:
        tables[members, :count] = tables[members[0], :count]
    for table, context in zip(tables, context_lens, strict=True):
        positions = np.arange(context)
        unused[table[positions // case.block_size], positions % case.block_size] = False
    for cache in caches:
        cache[unused] = np.nan
    queries = rng.standard_normal((query_lens.sum(), num_heads, case.head_dim[0])) * 2
    q, k_cache, v_cache = (mx.array(array.astype(np.float32)).astype(dtype) for array in (queries, *caches))
    if case.latent:
        v_cache = k_cache[..., : case.head_dim[1]]
    sinks = mx.array(rng.standard_normal(num_heads).astype(np.float32) * 2).astype(dtype) if case.sinks else None
    options = {"scale": case.head_dim[0] ** -0.5, "window": case.window, "softcap": case.softcap, "sinks": sinks}
    cu_seqlens_q = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    pool = quantised(case, k_cache, v_cache, unused) if case.codes else None
    if pool is not None:
        all_blocks = (pool.codes.gather_blocks(pool.arrays, name, mx.arange(num_blocks)) for name in "kv")
        k_cache, v_cache = (
            each.reshape(num_kv_heads, num_blocks, case.block_size, -1).transpose(1, 2, 0, 3) for each in all_blocks
        )
    return Arrays(q, k_cache, v_cache, mx.array(tables), context_lens, cu_seqlens_q, options, case.latent, pool)


def dense_attention(arrays: Arrays, chunk: int | None = None) -> np.ndarray:
    """Causal attention in float64, query by query, with keys and values picked from the blocks one by one.

    chunk: a query sees no key before the last multiple of it.
    """
    q, k_cache, v_cache = map(exact, arrays[:3])
    scale, window, softcap, sinks = arrays.options.values()
    tables, block_size = np.array(arrays.block_tables), k_cache.shape[1]
    group = q.shape[1] // k_cache.shape[2]
    out = np.zeros((*q.shape[:2], v_cache.shape[3]))
    for table, context, begin, end in zip(
        tables, arrays.context_lens, arrays.cu_seqlens_q[:-1], arrays.cu_seqlens_q[1:], strict=True
    ):
        positions = np.arange(context)
        blocks, offsets = table[positions // block_size], positions % block_size
        keys, values = (np.repeat(cache[blocks, offsets], group, axis=1) for cache in (k_cache, v_cache))
        for token in range(begin, end if context else begin):
            last = context - end + token
            first = 0 if window is None else max(0, last + 1 - window)
            first = first if chunk is None else last // chunk * chunk
            scores = np.einsum("khd,hd->hk", keys[first : last + 1], q[token]) * scale
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            if sinks is not None:  # a key whose value is zero
                scores = np.concatenate([scores, exact(sinks)[:, None]], axis=1)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            out[token] = np.einsum("hk,khd->hd", weights[:, : last + 1 - first], values[first : last + 1])
    return out


def exact(array: mx.array) -> np.ndarray:
    """The values in float64."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


def assert_close(out: mx.array, expected: np.ndarray) -> None:
    """float32 within 2e-5; half types within 1.5e-2 + 1% of an element and 1e-3 (8e-3 bfloat16) of the whole."""
    values = exact(out)
    assert np.isfinite(values).all()
    if out.dtype == mx.float32:
        np.testing.assert_allclose(values, expected, rtol=0, atol=2e-5)
        return
    np.testing.assert_allclose(values, expected, rtol=1e-2, atol=1.5e-2)
    limit = {mx.float16: 1e-3, mx.bfloat16: 8e-3}[out.dtype]
    assert np.linalg.norm(values - expected) <= limit * np.linalg.norm(expected)


def check(case: Case, seed: int = 0, backend: str | None = None) -> None:
    """Our result for a case against the dense one."""
    arrays = make_arrays(case, seed)
    out = arrays.attend(backend=backend)
    assert out.dtype == DTYPES[case.dtype]
    assert_close(out, dense_attention(arrays))


def split(patches: pytest.MonkeyPatch, part_size: int | None) -> None:
    """Have keys computed in parts of so many, of short contexts too. None: as it is decided."""
    if part_size is not None:
        patches.setattr(work_items, "keys_per_item", lambda *_: part_size)
        patches.setattr(work_items, "num_key_splits", lambda _, num_keys, *__: (-(-num_keys // part_size)).clip(1))


def share_all(patches: pytest.MonkeyPatch) -> None:
    """Have every prefix that sequences share computed once, short ones too, however few rows see it."""
    patches.setattr(found_at_load, "MIN_ROWS", 1)
    patches.setattr(found_at_load, "ASSUMED", found_at_load.SharingCosts(1.0, 0.0, 0.0, "keys"))


def decodes(*context_lens: int) -> tuple[tuple[int, int], ...]:
    """The lengths of a case with one query per sequence."""
    return tuple((1, context) for context in context_lens)


def strided(arrays: Arrays) -> Arrays:
    """The same with q and tables as parts of larger arrays."""
    dim, columns = arrays.q.shape[2], arrays.block_tables.shape[1]
    q = mx.concatenate([arrays.q + 1, arrays.q, arrays.q - 1], axis=2)[:, :, dim : 2 * dim]
    tables = mx.concatenate([arrays.block_tables] * 3, axis=1)[:, columns : 2 * columns]
    return arrays._replace(q=q, block_tables=tables)


def pairwise_cover(grid: dict[str, list[Any]], seed: int = 0, reused: Sequence[str] = ()) -> list[tuple[Any, ...]]:
    """Points in which every two values of different dimensions of the grid meet.

    reused: dimensions whose combinations cost something each time they are new, as those that kernels are compiled for.
    """
    generator = random.Random(seed)
    names = list(grid)
    kept = [names.index(name) for name in reused]

    def pairs_of(case: Sequence[Any]) -> set[tuple[int, Any, int, Any]]:
        return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(names)), 2)}

    missing = {
        (i, a, j, b)
        for i, j in itertools.combinations(range(len(names)), 2)
        for a in grid[names[i]]
        for b in grid[names[j]]
    }
    cases: list[tuple[Any, ...]] = []
    while missing:
        i, a, j, b = min(missing, key=repr)
        fitting = [case for case in cases if all(case[k] == v for k, v in ((i, a), (j, b)) if k in kept)]
        candidates = []
        for _ in range(30):
            values = [generator.choice(grid[name]) for name in names]
            if kept and fitting:
                earlier = generator.choice(fitting)
                for k in kept:
                    values[k] = earlier[k]
            values[i], values[j] = a, b
            candidates.append(tuple(values))
        best = max(candidates, key=lambda case: len(pairs_of(case) & missing))
        missing -= pairs_of(best)
        cases.append(best)
    return cases


def points_of(grid: dict[str, list[Any]], seed: int = 0, reused: Sequence[str] = ()) -> list[tuple[Any, ...]]:
    """The points to run: a cover of all pairs, or all."""
    return list(itertools.product(*grid.values())) if ALL_POINTS else pairwise_cover(grid, seed, reused)


def check_points(
    points: Sequence[tuple[Any, ...]], attend: Callable[[Arrays, Any], mx.array], gpu: Gpu, at_once: int = 14
) -> None:
    """Kernels against the dense result, with no findings. Points: the fields of a Case, the threads' order, `attend`'s.

    at_once: so many points' kernels are compiled on all cores before they run.
    """
    for start in range(0, len(points), at_once):
        chunk = points[start : start + at_once]
        arrays = [make_arrays(Case(*values[:-2]), seed=start + number) for number, values in enumerate(chunk)]

        def run(number: int, chunk: Any = chunk, arrays: Any = arrays) -> mx.array:
            order, option = chunk[number][-2:]
            gpu.configure(order=order)
            return attend(arrays[number], option)

        gpu.compile_ahead(lambda run=run, chunk=chunk: [run(number) for number in range(len(chunk))])
        for number, values in enumerate(chunk):
            out = run(number)
            assert out.dtype == arrays[number].q.dtype
            try:
                assert_close(out, dense_attention(arrays[number]))
            except AssertionError as error:
                raise AssertionError(f"at {values}: {error}") from None
    assert not gpu.simulated or not any(report.findings for report in gpu.reports)
