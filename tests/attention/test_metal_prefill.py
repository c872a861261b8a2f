"""metal/paged_prefill.metal: agreement with float64, traffic, and that mistakes are noticed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.attention_cases import (
    DTYPES,
    Arrays,
    Case,
    assert_close,
    check,
    check_points,
    dense_attention,
    make_arrays,
    points_of,
)
from helpers.planted import Mistake, plant
from metalsim.fixture import Metal

from mlx_paged.attention import paged_attention as attention
from mlx_paged.attention import work_items as kernel_plan
from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.kernel_backend import shape_of
from mlx_paged.attention.work_items import tile_for

METAL: Any = attention.BACKENDS["metal"]
GRID: dict[str, list[Any]] = {
    # (queries, context) of each sequence: a prompt, a chunk, several tokens each, everything, padding, a long context
    "lengths": [
        ((33, 33),),
        ((13, 86),),
        ((2, 33), (8, 70), (5, 16)),
        ((1, 50), (11, 30), (0, 12), (3, 3), (1, 1)),
        ((1, 0), (4, 9), (2, 0)),
        ((3, 301),),
    ],
    "heads": [(8, 8), (32, 8), (14, 2), (6, 1), (5, 1), (16, 1)],
    "head_dim": [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (64, 32), (40, 72)],
    "block_size": [8, 16, 32, 64],
    "window": [None, 1, 33, 256],
    "softcap": [None, 50.0],
    "sinks": [False, True],
    "dtype": list(DTYPES),
    "order": ["ascending", "descending"],
    "is_split": [False, True],
}
POINTS = points_of(GRID, seed=23, reused=("head_dim", "softcap", "sinks", "dtype"))
NUM_PARTS = 4
PROMPT = Case(((33, 33),), (4, 2), (32, 32))
LONG = PROMPT._replace(lengths=((3, 197),))


def prefill(arrays: Arrays) -> mx.array:
    """The prefill kernel's result, also for sequences with one query, which `paged_attention` gives to the other."""
    options = arrays.options
    shape = shape_of(*arrays[:3])
    plan = METAL.plan_prefill(arrays.context_lens, arrays.cu_seqlens_q, options["window"], shape)
    return METAL.prefill(*arrays[:4], plan, AttentionOptions(**options))


def split(patches: pytest.MonkeyPatch) -> None:
    """Have the keys of short contexts split, too."""
    patches.setattr(kernel_plan, "_LEAST_KEYS_PER_ROW", 1)
    patches.setattr(METAL, "num_cores", 10_000)


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_it_equals_dense_attention_over_the_grid(part: int, metal: Metal, monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(arrays: Arrays, is_split: bool) -> mx.array:
        with monkeypatch.context() as patches:
            if is_split:
                split(patches)
            return prefill(arrays)

    check_points(POINTS[part::NUM_PARTS], attend, metal)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_threads_does_not_matter(dtype: str, metal: Metal) -> None:
    for seed, order in enumerate(("random", "random", "descending")):
        metal.configure(order=order, seed=seed)
        check(PROMPT._replace(dtype=dtype), backend="metal")


def keys_of_tiles(arrays: Arrays, lengths: Sequence[tuple[int, int]], window: int | None) -> list[list[int]]:
    """For each sequence and tile, how many keys the tile's rows see."""
    shape = shape_of(*arrays[:3])
    rows, group = tile_for(shape).rows, shape.heads_per_kv_head
    seen = []
    for num_queries, context in lengths:
        tiles = []
        for first_row in range(0, num_queries * group, rows):
            last_row = min(first_row + rows, num_queries * group) - 1
            first, last = (context - num_queries + row // group for row in (first_row, last_row))
            tiles.append(last + 1 - (0 if window is None else max(0, first + 1 - window)))
        seen.append(tiles)
    return seen


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("dims", [(128, 128), (64, 32), (192, 128)])
def test_each_tile_reads_the_keys_that_its_rows_see_once(dims: Any, window: int | None, metal: Metal) -> None:
    lengths = ((30, 30), (11, 90), (1, 40))
    arrays = make_arrays(Case(lengths, head_dim=dims, window=window))
    prefill(arrays)
    traffic = metal.report.traffic
    keys = keys_of_tiles(arrays, lengths, window)
    for (_, context), tiles in zip(lengths, keys, strict=True):
        assert sum(tiles) <= len(tiles) * context
    for name, dim in zip(("k_cache", "v_cache"), dims, strict=True):
        assert traffic.buffers[name].bytes_read == sum(map(sum, keys)) * 2 * dim * 2  # KV heads, bytes
        assert traffic.buffers[name].lines_read * 128 == traffic.buffers[name].bytes_read * max(1, 64 // dim)
    assert traffic.buffers["q"].bytes_read == arrays.q.nbytes
    assert traffic.buffers["out"].bytes_written == arrays.q.shape[0] * 8 * dims[1] * 2


@pytest.mark.parametrize("num_queries", [2, 4, 8])
@pytest.mark.parametrize("is_split", [False, True])
def test_a_few_tokens_of_one_sequence_share_one_read_of_k_and_v(
    num_queries: int, is_split: bool, metal: Metal, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_split:
        split(monkeypatch)
    arrays = make_arrays(Case(((num_queries, 170),), head_dim=(128, 128)))
    assert_close(arrays.attend(backend="metal"), dense_attention(arrays))
    traffic = metal.reports[0].traffic
    for name in ("k_cache", "v_cache"):
        assert traffic.buffers[name].bytes_read == 170 * 2 * 128 * 2  # keys, KV heads, head_dim, bytes
    assert traffic.threadgroups == 2 * (6 if is_split else 1)
    assert len(metal.reports) == (2 if is_split else 1)


def test_blocks_outside_the_window_are_not_looked_up(metal: Metal) -> None:
    arrays = make_arrays(Case(((5, 160),), window=33))
    tables = np.array(arrays.block_tables)
    tables[:, : (160 - 5 + 1 - 33) // 16] = 2**26  # reading there would be out of bounds
    out = prefill(arrays._replace(block_tables=mx.array(tables)))
    assert_close(out, dense_attention(arrays))


def test_rows_of_queries_and_tables_may_have_any_stride(metal: Metal) -> None:
    arrays = make_arrays(Case(((7, 30), (2, 20)), dtype="float32"))
    q = mx.concatenate([arrays.q + 1, arrays.q, arrays.q - 1], axis=2)[:, :, 64:128]
    tables = mx.concatenate([arrays.block_tables] * 3, axis=1)[:, 8:16]
    assert_close(prefill(arrays._replace(q=q, block_tables=tables)), dense_attention(arrays))


def test_offsets_have_64_bits(metal: Metal) -> None:
    arrays = make_arrays(Case(((3, 3),), head_dim=(128, 128)))
    beyond = (1 << 32) // (16 * 2 * 128)  # with 32 bits of offset this is block 0
    with metal.finds("out-of-bounds read"):
        prefill(arrays._replace(block_tables=mx.full((1, 8), beyond, mx.int32)))


def test_sequences_without_queries_take_no_threadgroups(metal: Metal) -> None:
    arrays = make_arrays(Case(((0, 40), (9, 20), (0, 1))))
    assert_close(prefill(arrays), dense_attention(arrays))
    assert metal.report.traffic.threadgroups == 2 * 2  # tiles of 36 rows, KV heads
    assert prefill(make_arrays(Case(((0, 16),)))).shape == (0, 8, 64)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
RESCALED = "output[j] *= correction;\n  }\n  threadgroup"
MISTAKES = {
    "a key of the future is visible": (Mistake("distance >= 0", "distance >= -1"), PROMPT),
    "a query does not see itself": (Mistake("distance >= 0", "distance > 0"), PROMPT),
    "the window is one too long": (Mistake("distance < window", "distance <= window"), PROMPT._replace(window=5)),
    "the window begins one too late": (Mistake("group + 1 - window", "group + 2 - window"), LONG._replace(window=5)),
    "the last key is missing": (Mistake("last_key + 1", "last_key"), PROMPT),
    "slots without a token are read": (Mistake("row < num_keys", "row < TILE_KEYS"), PROMPT),
    "the next head's keys": (Mistake("num_kv_heads + kv_head)", "num_kv_heads + 1 - kv_head)"), PROMPT),
    "the output is not rescaled": (Mistake(RESCALED, RESCALED.replace("correction", "1")), LONG),
    "rows of another group size": (Mistake("(first_row + row) % group", "row % 3"), PROMPT),
    "each part has the sink": (Mistake(" && part == 0", ""), LONG._replace(sinks=True)),
    "parts overlap": (Mistake("part * rounds", "part * (rounds - 1)"), LONG),
    **{f"barrier {number} is missing": (Mistake(BARRIER, "", number), LONG) for number in range(4)},
}


def test_planted_mistakes_are_noticed(metal: Metal, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_noticed(name: str) -> bool:
        mistake, case = MISTAKES[name]
        with monkeypatch.context() as patches:
            planted = plant(mistake, metal, patches)
            if "part" in name:
                split(patches)
            try:
                check(case, backend="metal")
            except AssertionError as error:  # a SimulationError is one
                found = re.search("data race in threadgroup memory|uninitialised threadgroup memory", str(error))
                return "barrier" not in name or found is not None
            finally:
                assert planted
        return False

    metal.compile_ahead(lambda: [is_noticed(name) for name in MISTAKES])
    assert [name for name in MISTAKES if not is_noticed(name)] == []


@pytest.mark.parametrize("is_split", [False, True])
def test_without_a_mistake_the_same_cases_pass(is_split: bool, metal: Metal, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_split:
        split(monkeypatch)
    for case in {case for _, case in MISTAKES.values()}:
        check(case, backend="metal")
