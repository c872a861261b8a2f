"""paged_prefill, Metal's and CUDA's: agreement with float64, traffic, and that mistakes are noticed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.attention_cases import (
    DTYPES,
    FAR_BLOCK,
    Arrays,
    Case,
    assert_close,
    check_points,
    dense_attention,
    found_far,
    make_arrays,
    points_of,
    split,
    strided,
)
from helpers.gpu import Gpu
from helpers.planted import Mistake
from metalsim.fixture import Metal

from mlx_paged.attention.kernel_backend import shape_of

GRID: dict[str, list[Any]] = {
    # (queries, context) of each sequence: a prompt, a chunk, several tokens each, everything, padding, long contexts
    "lengths": [
        ((33, 33),),
        ((13, 86),),
        ((2, 33), (8, 70), (5, 16)),
        ((1, 50), (11, 30), (0, 12), (3, 3), (1, 1)),
        ((1, 0), (4, 9), (2, 0)),
        ((3, 301),),
        ((70, 150),),
    ],
    "heads": [(3, 3), (8, 2), (14, 2), (6, 1), (5, 1), (16, 1)],
    "head_dim": [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (64, 32), (40, 72)],
    "block_size": [8, 16, 32, 64],
    "window": [None, 1, 5, 33, 256],
    "softcap": [None, 50.0],
    "sinks": [False, True],
    "dtype": list(DTYPES),
    "order": ["ascending", "descending"],
    "part_size": [None, 80],
}
POINTS = points_of(GRID, seed=23, reused=("head_dim", "softcap", "sinks", "dtype"))
NUM_PARTS = 4


@pytest.mark.slow
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_it_equals_dense_attention_over_the_grid(part: int, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.take_part(part)

    def attend(arrays: Arrays, part_size: int | None) -> mx.array:
        with monkeypatch.context() as patches:
            split(patches, part_size)
            return gpu.prefill(arrays)

    check_points(POINTS[part::NUM_PARTS], attend, gpu)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_threads_does_not_matter(dtype: str, gpu: Gpu) -> None:
    for seed, order in enumerate(("random", "random", "descending")):
        gpu.configure(order=order, seed=seed)
        gpu.check(Case(((33, 33),), (4, 2), (32, 32), dtype=dtype))


def keys_of_tiles(rows: int, group: int, lengths: Sequence[tuple[int, int]], window: int | None) -> list[list[int]]:
    """For each sequence and tile of `rows`, how many keys the tile's rows see."""
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
@pytest.mark.parametrize("dims", [(128, 128), (128, 64), (64, 32), (192, 128)], ids=str)
def test_each_tile_reads_the_keys_that_its_rows_see_once(dims: Any, window: int | None, gpu: Gpu) -> None:
    lengths = ((70, 70), (11, 90), (1, 40))
    arrays = make_arrays(Case(lengths, head_dim=dims, window=window))
    gpu.prefill(arrays)
    traffic, rows = gpu.report.traffic, gpu.backend.prefill_tile(shape_of(arrays.q, arrays.pool)).rows
    keys = keys_of_tiles(rows, 4, lengths, window)
    for (_, context), tiles in zip(lengths, keys, strict=True):
        assert sum(tiles) <= len(tiles) * context
    for name, dim in zip(("k_cache", "v_cache"), dims, strict=True):
        assert traffic.buffers[name].bytes_read == sum(map(sum, keys)) * 2 * dim * 2  # KV heads, bytes
        assert traffic.buffers[name].lines_read * 128 == traffic.buffers[name].bytes_read * max(1, 64 // dim)
    assert traffic.buffers["q"].bytes_read == arrays.q.nbytes
    assert traffic.buffers["out"].bytes_written == arrays.q.shape[0] * 8 * dims[1] * 2


@pytest.mark.parametrize("num_queries", [5, 8])
@pytest.mark.parametrize("part_size", [None, 32])
def test_a_few_tokens_of_one_sequence_share_one_read_of_k_and_v(
    num_queries: int, part_size: int | None, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    split(monkeypatch, part_size)
    arrays = make_arrays(Case(((num_queries, 170),), head_dim=(128, 128)))
    assert_close(arrays.attend(backend=gpu.name), dense_attention(arrays))
    traffic = gpu.reports[0].traffic
    for name in ("k_cache", "v_cache"):
        assert traffic.buffers[name].bytes_read == 170 * 2 * 128 * 2  # keys, KV heads, head_dim, bytes
    assert traffic.threadgroups == 2 * (6 if part_size else 1)
    assert gpu.kernels_run == (["prefill", "merge"] if part_size else ["prefill"])


def test_blocks_outside_the_window_are_not_looked_up(gpu: Gpu) -> None:
    arrays = make_arrays(Case(((5, 160), (5, 49)), window=33))
    tables = np.array(arrays.block_tables)
    for table, context in zip(tables, (160, 49), strict=True):
        table[: (context - 5 + 1 - 33) // 16] = 2**26  # reading there would be out of bounds
    out = gpu.prefill(arrays._replace(block_tables=mx.array(tables)))
    assert_close(out, dense_attention(arrays))
    read = gpu.report.traffic.buffers["k_cache"].bytes_read
    assert read == 2 * (33 + 5 - 1) * 2 * 64 * 2  # sequences, keys, KV heads, head_dim, bytes


def test_the_last_items_which_see_most_keys_are_computed_first(gpu: Gpu) -> None:
    gpu.only_simulated("memory that is not there is read")
    arrays = make_arrays(Case(((40, 40), (40, 40))))
    tables = np.array(arrays.block_tables)
    tables[1] = FAR_BLOCK
    with pytest.raises(AssertionError, match=r"threadgroup \(0, 0, 0\)"):
        gpu.prefill(arrays._replace(block_tables=mx.array(tables)))


def test_a_simdgroup_computes_nothing_with_keys_that_none_of_its_rows_sees(metal: Metal) -> None:
    """Tiles of 32 keys, and 32 queries in four simdgroups, of which the first sees nothing of the second tile."""
    read = []
    for context in (32, 56):
        Gpu("metal", metal).prefill(make_arrays(Case(((32, context),), heads=(1, 1))))
        read.append(metal.report.traffic.threadgroup_bytes_read)
    assert read[1] / read[0] == (4 + 3) / 4


def test_rows_of_queries_and_tables_may_have_any_stride(gpu: Gpu) -> None:
    arrays = make_arrays(Case(((7, 30), (2, 20)), dtype="float32"))
    assert_close(gpu.prefill(strided(arrays)), dense_attention(arrays))


@pytest.mark.parametrize("of", ["keys", "values"])
def test_offsets_have_64_bits(of: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    if of == "values":  # keys come first, so they are left out
        gpu.plant(WITHOUT_KEYS[gpu.name], monkeypatch)
    gpu.only_simulated("memory that is not there is read")
    arrays = make_arrays(Case(((3, 3),), head_dim=(128, 128)))
    with pytest.raises(AssertionError, match=found_far("read")):
        gpu.prefill(arrays._replace(block_tables=mx.full((1, 8), FAR_BLOCK, mx.int32)))


def test_sequences_without_queries_take_no_threadgroups(gpu: Gpu) -> None:
    arrays = make_arrays(Case(((0, 40), (9, 20), (0, 1))))
    assert_close(gpu.prefill(arrays), dense_attention(arrays))
    rows = gpu.backend.prefill_tile(shape_of(arrays.q, arrays.pool)).rows
    assert gpu.report.traffic.threadgroups == -(-9 * 4 // rows) * 2  # tiles of 36 rows, KV heads
    assert gpu.prefill(make_arrays(Case(((0, 16),)))).shape == (0, 8, 64)


# -- mistakes --

PROMPT = Case(((33, 33),), (4, 2), (32, 32))
LONG = PROMPT._replace(lengths=((9, 197),))
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
RESCALED = "output[j] *= correction;\n  }\n  threadgroup"
CHUNK = Case(((33, 150),))
FAR_WINDOW = CHUNK._replace(window=70)
FULL_TABLE = CHUNK._replace(lengths=((33, 128),))
WINDOWED = Case(((33, 150),), window=5)
KEYS = "k_cache, num_kv_heads, kv_head, table, block_shift, key"
WITHOUT_KEYS = {
    "metal": Mistake(f"{KEYS}, num_keys", f"{KEYS}, 0", PROMPT),
    "cuda": Mistake("if (begin < end)", "if (false)", PROMPT),
}
WAIT = "wait_for_copies<0>();"
SYNC = "__syncthreads();"
WIDE = Case(((9, 30),), (2, 1), (64, 512))  # two simdgroups to 8 rows
MISTAKES: dict[str, dict[str, Mistake]] = {
    "metal": {
        "a key of the future is visible": Mistake("distance < 0", "distance < -1", PROMPT),
        "a query does not see itself": Mistake("distance < 0", "distance <= 0", PROMPT),
        "the window is one too long": Mistake("distance >= window", "distance > window", PROMPT._replace(window=5)),
        "no mask where it is needed": Mistake("> lowest_position ||", "> lowest_position + 9 ||", CHUNK),
        "no mask before the window": Mistake("<= highest_position - window", "< lowest_position - window", FAR_WINDOW),
        "tiles are skipped too soon": Mistake("key <= highest_position &&", "key < lowest_position &&", CHUNK),
        "tiles in the window are skipped": Mistake("lowest_position + 1 - window;", "highest_position;", FAR_WINDOW),
        "a simdgroup's last row sees as its first": Mistake("first_row + last_row", "first_row + simdgroup_row", CHUNK),
        "the window begins one too late": Mistake("group + 1 - window", "group + 2 - window", LONG._replace(window=5)),
        "the last key is missing": Mistake("last_key + 1", "last_key", PROMPT),
        "the next head's keys": Mistake("num_kv_heads + kv_head;", "num_kv_heads + 1 - kv_head;", PROMPT),
        "a key past the end is looked up": Mistake("min(own_key, end - 1), block", "own_key, block", FULL_TABLE),
        "keys of the tile before": Mistake("own_key += TILE_KEYS", "own_key += 0", LONG),
        "keys that are not there are left over": Mistake("piece = uint4(0)", "piece = uint4(0x7fc07fc0)", PROMPT),
        "the output is not rescaled": Mistake(RESCALED, RESCALED.replace("correction", "1"), LONG),
        "rows of another group size": Mistake("(first_row + row) % group", "row % 3", PROMPT),
        "each part has the sink": Mistake(" && part == 0", "", LONG._replace(sinks=True), part_size=32),
        "parts overlap": Mistake("part * rounds", "part * (rounds - 1)", LONG, part_size=32),
        "the columns of a neighbour": Mistake("kv_tile + first_column", "kv_tile", WIDE),
        "a neighbour with other rows": Mistake("threadgroup / HALVES * 8", "threadgroup * 8", WIDE),
        **{
            f"barrier {number} is missing": Mistake(BARRIER, "", LONG, number, finding="threadgroup memory")
            for number in range(4)
        },
    },
    "cuda": {
        "a key of the future is visible": Mistake("distance < 0", "distance < -1", CHUNK),
        "a query does not see itself": Mistake("distance < 0", "distance <= 0", CHUNK),
        "the window is one too long": Mistake("distance >= window_keys", "distance > window_keys", WINDOWED),
        "the window begins one too late": Mistake("+ 1 - window_keys", "+ 2 - window_keys", WINDOWED),
        "the last key is missing": Mistake("last_key + 1)", "last_key)", CHUNK),
        "no mask where it is needed": Mistake("> lowest_position ||", "> lowest_position + 9 ||", CHUNK),
        "tiles are skipped too soon": Mistake("key <= highest_position &&", "key < lowest_position &&", CHUNK),
        "what follows a row counts": Mistake(
            "is_there && element < DIM", "is_there", Case(((33, 33),), head_dim=(40, 72))
        ),
        "rows of another group size": Mistake("(first_row + row) % group", "row % 3", CHUNK),
        "each part has the sink": Mistake(" && part == 0", "", Case(((9, 197),), sinks=True), part_size=80),
        "parts overlap": Mistake("part * rounds", "part * (rounds - 1)", Case(((9, 197),)), part_size=80),
        "a row of matrix b": Mistake("lane / 16 * 8) * STRIDE + lane", "lane / 16 * 4) * STRIDE + lane", CHUNK),
        "no wait for keys": Mistake(WAIT, "", CHUNK),
        "no wait for values": Mistake(WAIT, "", CHUNK, 1),
        "no barrier before scores": Mistake(SYNC, "", CHUNK),
        "no barrier before values": Mistake(SYNC, "", CHUNK, 1),
    },
}


@pytest.mark.slow
def test_planted_mistakes_are_noticed(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.unnoticed(MISTAKES[gpu.name], monkeypatch) == []


def test_without_a_mistake_the_same_cases_pass(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.check_without(MISTAKES[gpu.name], monkeypatch)
