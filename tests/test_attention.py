"""paged_attention against dense attention in float64, rebuilt from the blocks."""

from __future__ import annotations

import itertools
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from mlx_paged import paged_attention, reference
from mlx_paged.attention import AttentionMetadata, attend

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

# (query length, context length) of each sequence of a batch
BATCHES = {
    "one decode": [(1, 54)],
    "decodes of all lengths": [(1, n) for n in (1, 15, 16, 17, 54, 97, 1023)],
    "similar decodes": [(1, 30 + n) for n in range(17)],
    "one prompt": [(97, 97)],
    "chunk of a prompt": [(33, 129)],
    "several tokens each": [(4, 20), (3, 3), (7, 100)],
    "mixed": [(1, 1024), (16, 16), (1, 17), (40, 200), (1, 1), (1, 97)],
    "decodes and padding": [(1, 300), (1, 0), (1, 20)],
    "padding": [(1, 0), (1, 33), (2, 0), (5, 9)],
}
GRID: dict[str, list[Any]] = {
    "batch": list(BATCHES),
    "heads": [(8, 8), (32, 8), (40, 40), (14, 2), (6, 1), (5, 1)],
    "head_dim": [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (64, 32)],
    "block_size": [1, 3, 8, 16, 32],
    "window": [None, 1, 33, 256],
    "softcap": [None, 50.0],
    "sinks": [False, True],
    "dtype": list(DTYPES),
    "consecutive": [False, True],
}


class Case(NamedTuple):
    """A point of the grid; `heads` are (query, KV) heads, `head_dim` that of keys and of values."""

    batch: str
    heads: tuple[int, int]
    head_dim: tuple[int, int]
    block_size: int
    window: int | None
    softcap: float | None
    sinks: bool
    dtype: str
    consecutive: bool


def pairwise_cover(seed: int) -> list[Case]:
    """Cases in which every two values of different dimensions of the grid meet."""
    generator = random.Random(seed)
    names = list(GRID)

    def pairs_of(case: Case) -> set[tuple[int, Any, int, Any]]:
        return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(names)), 2)}

    missing = {
        (i, a, j, b)
        for i, j in itertools.combinations(range(len(names)), 2)
        for a in GRID[names[i]]
        for b in GRID[names[j]]
    }
    cases = []
    while missing:
        i, a, j, b = min(missing, key=repr)
        candidates = []
        for _ in range(30):
            values = [generator.choice(GRID[name]) for name in names]
            values[i], values[j] = a, b
            candidates.append(Case(*values))
        best = max(candidates, key=lambda case: len(pairs_of(case) & missing))
        missing -= pairs_of(best)
        cases.append(best)
    return cases


def dense_attention(
    q: np.ndarray,
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    tables: np.ndarray,
    lengths: list[tuple[int, int]],
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: np.ndarray | None,
) -> np.ndarray:
    """Causal attention in float64, sequence by sequence and head by head."""
    block_size = k_cache.shape[1]
    out = np.zeros((*q.shape[:2], v_cache.shape[3]))
    group = q.shape[1] // k_cache.shape[2]
    token = 0
    for table, (num_queries, context) in zip(tables, lengths, strict=True):
        slots = [(table[p // block_size], p % block_size) for p in range(context)]
        for query in range(num_queries if context else 0):
            position = context - num_queries + query
            first = 0 if window is None else max(0, position + 1 - window)
            rows = slots[first : position + 1]
            for head in range(q.shape[1]):
                keys = np.array([k_cache[b, o, head // group] for b, o in rows])
                values = np.array([v_cache[b, o, head // group] for b, o in rows])
                scores = keys @ q[token + query, head] * scale
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                sink = [] if sinks is None else [sinks[head]]
                peak = max([*scores, *sink])
                weights = np.exp(scores - peak)
                out[token + query, head] = weights @ values / (weights.sum() + sum(np.exp(np.array(sink) - peak)))
        token += num_queries
    return out


def run_case(case: Case, seed: int) -> None:
    """Random arrays for a case, NaN in every slot that no token has, our result against the dense one."""
    rng = np.random.default_rng(seed)
    lengths = BATCHES[case.batch]
    dtype = DTYPES[case.dtype]
    num_heads, num_kv_heads = case.heads
    blocks_of = [-(-context // case.block_size) for _, context in lengths]
    num_blocks = sum(blocks_of) + 3
    order = np.arange(num_blocks) if case.consecutive else rng.permutation(num_blocks)
    tables = np.full((len(lengths), max(blocks_of) + 1), -1, np.int32)  # unused entries are not block ids
    caches = [
        np.full((num_blocks, case.block_size, num_kv_heads, dim), np.nan, np.float32) for dim in case.head_dim
    ]
    taken = 0
    for i, (_, context) in enumerate(lengths):
        tables[i, : blocks_of[i]] = order[taken : taken + blocks_of[i]]
        taken += blocks_of[i]
        for position in range(context):
            for cache in caches:
                slot = cache[tables[i, position // case.block_size], position % case.block_size]
                slot[:] = rng.standard_normal(slot.shape)
    num_tokens = sum(num_queries for num_queries, _ in lengths)
    queries = rng.standard_normal((num_tokens, num_heads, case.head_dim[0])).astype(np.float32) * 2
    sinks = rng.standard_normal(num_heads).astype(np.float32) * 2 if case.sinks else None
    q, k_cache, v_cache = (mx.array(array).astype(dtype) for array in (queries, *caches))
    scale = case.head_dim[0] ** -0.5
    out = paged_attention(
        q,
        k_cache,
        v_cache,
        mx.array(tables),
        mx.array([context for _, context in lengths], mx.int32),
        mx.array(np.cumsum([0] + [num_queries for num_queries, _ in lengths]).astype(np.int32)),
        scale=scale,
        window=case.window,
        softcap=case.softcap,
        sinks=None if sinks is None else mx.array(sinks).astype(dtype),
    )
    assert out.dtype == dtype
    if sinks is not None:
        sinks = np.array(mx.array(sinks).astype(dtype).astype(mx.float32))
    exact = [np.array(array.astype(mx.float32)).astype(np.float64) for array in (q, k_cache, v_cache)]
    expected = dense_attention(*exact, tables, lengths, scale, case.window, case.softcap, sinks)
    assert_close(np.array(out.astype(mx.float32)), expected, case.dtype)


def assert_close(out: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    """float32 within 2e-5; half types within 1.5e-2 + 1% of an element and 1e-3 (8e-3 bfloat16) of the whole."""
    assert np.isfinite(out).all()
    if dtype == "float32":
        np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5)
        return
    np.testing.assert_allclose(out, expected, rtol=1e-2, atol=1.5e-2)
    limit = {"float16": 1e-3, "bfloat16": 8e-3}[dtype]
    assert np.linalg.norm(out - expected) <= limit * np.linalg.norm(expected)


# MLX_PAGED_FULL_GRID=1 runs every combination (hours) instead of a cover of all pairs.
FULL_GRID = [Case(*values) for values in itertools.product(*GRID.values())]
CASES = FULL_GRID if os.environ.get("MLX_PAGED_FULL_GRID") else pairwise_cover(seed=0)


@pytest.mark.parametrize("part", range(8))
def test_it_equals_dense_attention_over_the_grid(part: int) -> None:
    for number, case in enumerate(CASES[part::8]):
        run_case(case, seed=number)


@pytest.mark.parametrize("limit", [1, 20_000])
def test_tiles_and_groups_bounded_by_memory_give_the_same_result(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_MAX_BYTES", limit)
    for batch, window, consecutive in itertools.product(("mixed", "similar decodes"), (None, 33), (False, True)):
        run_case(Case(batch, (4, 2), (64, 64), 8, window, None, True, "float32", consecutive), seed=1)


@pytest.mark.parametrize("spread", [7, 200], ids=["similar", "different"])
def test_a_batch_of_decodes_builds_no_more_operations_than_a_few(spread: int, tmp_path: Path) -> None:
    def num_operations(batch_size: int) -> int:
        k_cache = mx.zeros((28 * batch_size, 8, 2, 32))
        out = paged_attention(
            mx.zeros((batch_size, 4, 32)),
            k_cache,
            k_cache,
            mx.arange(28 * batch_size, dtype=mx.int32).reshape(batch_size, 28),
            mx.array([25 + 37 * i % spread for i in range(batch_size)], mx.int32),
            mx.arange(batch_size + 1, dtype=mx.int32),
            scale=1.0,
        )
        mx.export_to_dot(str(tmp_path / "graph.dot"), out)
        return (tmp_path / "graph.dot").read_text().count("shape=rectangle")

    assert num_operations(64) == num_operations(4) > 0


@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("window", [None, 5000])
def test_long_contexts_cost_the_host_nothing_until_the_device_computes(window: int | None, num_queries: int) -> None:
    num_seqs, context, block_size = 64, 100_000, 16
    no_device_has = mx.zeros((1 << 20, 1 << 20), mx.int32) + 1  # evaluating it would fail
    metadata = AttentionMetadata(
        no_device_has[:num_seqs, : context // block_size],
        np.full(num_seqs, context, np.int32) - np.arange(num_seqs, dtype=np.int32),
        np.arange(num_seqs + 1, dtype=np.int32) * num_queries,
    )
    q, k_cache = mx.zeros((num_seqs * num_queries, 4, 8)), mx.zeros((2, block_size, 2, 8))
    mx.eval(q, k_cache)
    before = mx.get_active_memory()
    tracemalloc.start()
    try:
        out = attend(q, k_cache, k_cache, metadata, scale=1.0, window=window)
        _, host_peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert out.shape == q.shape
    assert host_peak < 4 * context
    assert mx.get_active_memory() - before < 4 * context


def _arguments(**changes: Any) -> dict[str, Any]:
    """Valid arguments of two sequences, (1 query, 20 tokens) and (3 queries, 10 tokens), with some replaced."""
    k_cache = mx.zeros((8, 8, 2, 16))
    arguments: dict[str, Any] = {
        "q": mx.zeros((4, 4, 16)),
        "k_cache": k_cache,
        "v_cache": k_cache,
        "block_tables": mx.array([[0, 1, 2], [3, 4, 0]], mx.int32),
        "context_lens": mx.array([20, 10], mx.int32),
        "cu_seqlens_q": mx.array([0, 1, 4], mx.int32),
        "scale": 1.0,
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"softcap": 0.0}, ValueError, "softcap must be above 0"),
        ({"softcap": -1.0}, ValueError, "softcap must be above 0"),
        ({"sinks": mx.zeros(3)}, ValueError, "sinks"),
        ({"backend": "abacus"}, ValueError, "abacus"),
        ({"q": mx.zeros((4, 4, 16), mx.float16)}, TypeError, "dtype"),
        ({"v_cache": mx.zeros((8, 8, 2, 16), mx.float16)}, TypeError, "dtype"),
        ({"q": mx.zeros((4, 3, 16))}, ValueError, "3 query heads"),
        ({"q": mx.zeros((4, 4, 8))}, ValueError, "head_dim"),
        ({"q": mx.zeros((4, 64))}, ValueError, "num_heads"),
        ({"v_cache": mx.zeros((9, 8, 2, 16))}, ValueError, "differ in blocks"),
        ({"block_tables": mx.zeros((2, 3), mx.int64)}, TypeError, "block_tables must be int32"),
        ({"context_lens": mx.array([20.0, 10.0])}, TypeError, "context_lens must be int32"),
        ({"cu_seqlens_q": mx.array([0, 1, 4], mx.uint32)}, TypeError, "cu_seqlens_q must be int32"),
        ({"cu_seqlens_q": mx.array([0, 1, 3], mx.int32)}, ValueError, "4 tokens"),
        ({"cu_seqlens_q": mx.array([0, 5, 4], mx.int32)}, ValueError, "rise"),
        ({"cu_seqlens_q": mx.array([0, 4], mx.int32)}, ValueError, "num_seqs"),
        ({"context_lens": mx.array([20, 2], mx.int32)}, ValueError, "3 queries but a context of 2"),
        ({"context_lens": mx.array([25, 10], mx.int32)}, ValueError, "25 tokens, its table room for 24"),
        ({"context_lens": mx.array([-1, 10], mx.int32)}, ValueError, "negative"),
        ({"block_tables": mx.array([[0, 1, 8], [3, 4, 0]], mx.int32)}, ValueError, "block 8"),
        ({"block_tables": mx.array([[0, -1, 2], [3, 4, 0]], mx.int32)}, ValueError, "block -1"),
    ],
)
def test_arguments_that_do_not_fit_together_are_named(changes: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        paged_attention(**_arguments(**changes))


def test_metadata_may_be_host_arrays() -> None:
    names = ("block_tables", "context_lens", "cu_seqlens_q")
    arguments = _arguments()
    on_host = arguments | {name: np.array(arguments[name]) for name in names}
    assert mx.array_equal(paged_attention(**arguments), paged_attention(**on_host))


def test_no_tokens_give_an_empty_result() -> None:
    empty = _arguments(
        q=mx.zeros((0, 4, 16)),
        block_tables=mx.zeros((0, 3), mx.int32),
        context_lens=mx.zeros(0, mx.int32),
        cu_seqlens_q=mx.zeros(1, mx.int32),
    )
    assert paged_attention(**empty).shape == (0, 4, 16)
