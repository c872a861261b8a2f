"""paged_decode and paged_merge, Metal's and CUDA's: agreement with float64, traffic, and that mistakes are noticed."""

from __future__ import annotations

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
    decodes,
    dense_attention,
    found_far,
    make_arrays,
    points_of,
    split,
    strided,
)
from helpers.gpu import Gpu
from helpers.planted import Mistake

from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.kernel_backend import shape_of
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.attention.work_items import Shape
from mlx_paged.cache.kv_cache import LayerPool

GRID: dict[str, list[Any]] = {
    "lengths": [
        decodes(54),
        decodes(1, 15, 16, 17, 54, 97, 33),
        decodes(*range(30, 47)),
        decodes(70, 0, 33),
        decodes(1023, 1025),
        decodes(4097),
        ((2, 54), (2, 2), (1, 70), (2, 300)),
        ((3, 40), (1, 33), (8, 90), (5, 64), (4, 1030)),
    ],
    "heads": [(3, 3), (8, 2), (14, 2), (6, 1), (5, 1), (16, 1), (24, 1)],
    "head_dim": [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (64, 32), (40, 72)],
    "block_size": [8, 16, 32, 64],
    "window": [None, 1, 5, 33, 256],
    "softcap": [None, 50.0],
    "sinks": [False, True],
    "dtype": list(DTYPES),
    "order": ["ascending", "descending"],
    "part_size": [None, 64],
}
POINTS = points_of(GRID, seed=2)
NUM_PARTS = 4


@pytest.mark.slow
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_it_equals_dense_attention_over_the_grid(part: int, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.take_part(part)

    def attend(arrays: Arrays, part_size: int | None) -> mx.array:
        with monkeypatch.context() as patches:
            split(patches, part_size)
            return arrays.attend(backend=gpu.name)

    check_points(POINTS[part::NUM_PARTS], attend, gpu)


@pytest.mark.parametrize("context", [4095, 4096, 4097])
def test_contexts_about_a_power_of_two_are_split_and_merged(context: int, gpu: Gpu) -> None:
    gpu.check(Case(decodes(context), heads=(6, 1), block_size=32, dtype="float32"))
    assert gpu.kernels_run == ["decode", "merge"]


def test_more_parts_than_lanes_are_merged(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    split(monkeypatch, 32)
    gpu.check(Case(decodes(1100, 3), heads=(2, 1), sinks=True, dtype="float32"))
    assert gpu.kernels_run == ["decode", "merge"]


def test_a_key_that_outweighs_all_others_is_found_past_the_first_32_parts(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    split(monkeypatch, 32)
    arrays = make_arrays(Case(decodes(1100), heads=(1, 1), dtype="float32"))
    query = arrays.q[0, 0]
    table, last = np.array(arrays.block_tables)[0], 1099
    key = query * 200 / (arrays.options["scale"] * (query * query).sum())  # its logit is 200
    arrays.k_cache[int(table[last // 16]), last % 16, 0] = key
    out = arrays.attend(backend=gpu.name)
    assert gpu.kernels_run == ["decode", "merge"]
    assert_close(out, dense_attention(arrays))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_threads_does_not_matter(dtype: str, gpu: Gpu) -> None:
    for seed in range(2):
        gpu.configure(order="random", seed=seed)
        gpu.check(Case(decodes(70, 0, 40), dtype=dtype))


def test_a_context_of_nothing_gives_zeros(gpu: Gpu) -> None:
    out = make_arrays(Case(decodes(0, 9, 0))).attend(backend=gpu.name)
    assert not out[0].any() and not out[2].any() and out[1].any()


def test_blocks_outside_the_window_are_never_read(gpu: Gpu) -> None:
    arrays = make_arrays(Case(decodes(200, 49), window=33))
    tables = np.array(arrays.block_tables)
    tables[0, : 167 // 16] = tables[1, : 16 // 16] = 2**26  # reading there would be out of bounds
    # The public function would refuse these ids.
    metadata = AttentionMetadata(mx.array(tables), arrays.context_lens, arrays.cu_seqlens_q)
    out = gpu.backend.attend(arrays.q, arrays.pool, metadata, AttentionOptions(**arrays.options))
    assert_close(out, dense_attention(arrays))
    read = gpu.report.traffic.buffers["k_cache"].distinct_bytes_read
    assert read == 2 * 33 * 2 * 64 * 2  # sequences, keys, KV heads, head_dim, bytes


def test_rows_of_queries_and_tables_may_have_any_stride(gpu: Gpu) -> None:
    arrays = make_arrays(Case(decodes(40, 0, 33), heads=(6, 2), dtype="float32"))
    plan = gpu.backend.plan_decode(*arrays.lengths, None, shape_of(arrays.q, arrays.pool))
    arrays = strided(arrays)
    options = AttentionOptions(arrays.options["scale"])
    out = gpu.backend.run(arrays.q, arrays.pool, arrays.block_tables, plan, options)
    assert_close(out, dense_attention(arrays))


@pytest.mark.parametrize("of", ["keys", "values"])
def test_offsets_have_64_bits(of: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.plant(OTHERS_AT_0[gpu.name][of], monkeypatch)
    gpu.only_simulated("memory that is not there is read")
    arrays = make_arrays(Case(decodes(3), head_dim=(128, 128)))
    plan = gpu.backend.plan_decode(*arrays.lengths, None, shape_of(arrays.q, arrays.pool))
    with pytest.raises(AssertionError, match=found_far("read")):
        tables = mx.full((1, 8), FAR_BLOCK, mx.int32)
        gpu.backend.run(arrays.q, arrays.pool, tables, plan, AttentionOptions(1.0))


@pytest.mark.parametrize(
    ("ratio", "head_dim", "dtype"),
    [
        (1, 64, "float16"),
        (4, 64, "float16"),
        (4, 128, "float16"),
        (4, 128, "float32"),
        (6, 256, "bfloat16"),
        (8, 128, "bfloat16"),
        (16, 64, "float32"),
        (16, 128, "bfloat16"),
        (16, 256, "float16"),
    ],
)
def test_keys_and_values_leave_memory_once_in_whole_lines(ratio: int, head_dim: int, dtype: str, gpu: Gpu) -> None:
    """Batch 1, 4096 keys, divided as for 8 KV heads, of which one is run."""
    num_keys, size = 4096, DTYPES[dtype].size
    plan = gpu.backend.plan_decode(np.array([num_keys]), np.arange(2), None, Shape(8, ratio, head_dim, head_dim, size))
    pool = mx.random.normal((256, 16, 1, head_dim)).astype(DTYPES[dtype])
    tables = mx.array(np.random.default_rng(0).permutation(256).astype(np.int32)[None])
    q = mx.random.normal((1, ratio, head_dim)).astype(DTYPES[dtype])
    gpu.backend.run(q, LayerPool({"k": pool, "v": pool + 0}), tables, plan, AttentionOptions(0.1))
    decode, merge = (report.traffic for report in gpu.reports)
    compulsory = num_keys * head_dim * size
    # No two threadgroups have a key in common. In one of Metal's, what a simdgroup reads its neighbours read again, for
    # the other query heads, 512 elements of which are one's: that a cache has it then, nothing here can show.
    assert sum(end - begin for begin, end in np.array(plan.work)[: plan.num_items, 4:6]) == num_keys
    readers = -(-ratio * head_dim // 512) if gpu.name == "metal" else 1
    for name in ("k_cache", "v_cache"):
        assert decode.buffers[name].distinct_bytes_read == compulsory
        assert decode.buffers[name].bytes_read <= 1.01 * readers * compulsory
        assert decode.buffers[name].lines_read * 128 <= 1.05 * readers * compulsory
    assert decode.threadgroups * 8 >= 64
    written = decode.buffers["out"].bytes_written + decode.buffers["lse"].bytes_written
    partial = written + merge.buffers["parts"].bytes_read + merge.buffers["lse"].bytes_read
    # With more than 9 query heads to a KV head, 64 threadgroups and 2% exclude each other at this length.
    assert partial <= (0.02 if ratio <= 9 else 0.033) * 2 * compulsory
    assert decode.threadgroup_memory <= (32 if gpu.name == "metal" else 96) << 10
    assert decode.threads // decode.threadgroups <= 1024


# -- mistakes --

PLAIN = Case(decodes(150, 20))
SHORT = Case(decodes(150, 20), (4, 2), (32, 32), sinks=True, window=140, dtype="float32")
LONG = Case(decodes(400), (4, 2), (32, 32), dtype="float32")
ODD = Case(decodes(150, 20), (4, 2), (40, 72))  # some lanes have no part of a row
WIDE = Case(decodes(60), (4, 1), (32, 128), dtype="float32")  # teams are added for two heads at a time
TWO_DIMS = LONG._replace(head_dim=(64, 64))
UNEVEN = Case(decodes(300), (5, 1), (128, 128), sinks=True)  # two neighbours, with 3 and 2 of the heads
SEVERAL = Case(((3, 150), (2, 20)), (4, 2), (32, 32), sinks=True, window=40, dtype="float32")
MANY_LONG = Case(decodes(70, 70), (13, 1), (256, 256))  # seven, which have all of the keys
#: To try offsets of the one, those of the other are 0.
OTHERS_AT_0 = {
    "metal": {
        "keys": Mistake("values, own_row", "values, 0 * own_row", PLAIN, -1),
        "values": Mistake("(keys, own_row", "(keys, 0 * own_row", PLAIN, -1),
    },
    "cuda": {
        "keys": Mistake("(size_t(max(from, 0)) * num_kv_heads + kv_head) * VALUE_DIM", "0", PLAIN),
        "values": Mistake("(size_t(max(from, 0)) * num_kv_heads + kv_head) * HEAD_DIM", "0", PLAIN),
    },
}
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
HALF = Case(decodes(150, 20), sinks=True, window=140)
ONE_GROUP = Case(decodes(400), heads=(5, 1), dtype="float32")
SYNC = "__syncthreads();"
MISTAKES: dict[str, dict[str, Mistake]] = {
    "metal": {
        "keys and values of another head": Mistake("num_kv_heads + kv_head;", "num_kv_heads;", SHORT, part_size=64),
        "the first values of another head": Mistake(
            "values, own_row, row", "values, own_row - kv_head, row", SHORT, 0, 64
        ),
        "later values of another head": Mistake("values, own_row, f", "values, own_row - kv_head, f", SHORT, 0, 64),
        "the values of the batch before": Mistake("if (batch > 0) {", "if (batch > 1) {", SHORT, part_size=64),
        "keys of the tile before": Mistake("(table, metal::min(key +", "(table, metal::min(0 * key +", LONG, 0, 1024),
        "the key past the end": Mistake("metal::max(end - 1, 0)", "end", SHORT, part_size=64),
        "what follows a row": Mistake("CHUNKS - 1)", "CHUNKS)", ODD),
        "what follows a query": Mistake("if (chunk < KEY_CHUNKS) load", "load", ODD),
        "the queries of another head": Mistake("head = kv_head * HEADS +", "head =", SHORT, part_size=64),
        "a window that is one too short": Mistake("const int key = begin", "const int key = begin + 1", SHORT, 0, 64),
        "a query that sees the next one": Mistake("distance >= 0", "distance >= -1", SEVERAL),
        "a query that sees too much": Mistake("distance < window", "distance <= window", SEVERAL),
        "the first query for all": Mistake("first_token + row / HEADS", "first_token", SEVERAL),
        "results of queries in each other's place": Mistake("row / HEADS * num_parts", "row / HEADS", SEVERAL, 0, 16),
        "a query too many": Mistake("num_rows = num_queries * HEADS", "num_rows = ROWS", SEVERAL),
        "a context that is one too long": Mistake("key < end", "key <= end", SHORT, part_size=64),
        "the block after": Mistake("table[key >> block_shift]", "table[(key >> block_shift) + 1]", SHORT, 0, 64),
        "a sink in every part": Mistake("part == 0 && ", "", SHORT, part_size=64),
        "a sink in every team": Mistake("team == 0 && ", "", SHORT, part_size=64),
        "no correction of the output": Mistake("*= correction;", "*= 1.0f;", LONG, part_size=1024),
        "no correction of the total": Mistake("total * correction + sum", "total + sum", LONG, part_size=1024),
        "a lane too few in the sums": Mistake("offset < lanes", "offset < lanes / 2", SHORT, part_size=64),
        "a weight of another key": Mistake("(scores[g], first_lane", "(scores[g], batch * BATCH", SHORT, part_size=64),
        "the heads of a neighbour": Mistake("first_row = group * H", "first_row = 0", UNEVEN),
        "the sinks of a neighbour": Mistake("(first_row + lane) % HEADS", "lane % HEADS", UNEVEN),
        "the tiles of another team": Mistake("simd_index / GROUPS", "simd_index % TEAMS", UNEVEN),
        "the totals of a neighbour": Mistake("int i = group; i", "int i = 0; i", UNEVEN, 1),
        "a head too many is merged": Mistake("if (row < num_rows) out", "out", UNEVEN, part_size=64),
        "the logarithm of a head too many": Mistake(
            "team == 0 && first_row + lane < num_rows", "team == 0", UNEVEN, 0, 64
        ),
        "a head too many is written": Mistake("CHUNKS && first_row + g < num_rows", "CHUNKS", MANY_LONG),
        "no barrier after peaks": Mistake(BARRIER, "", SHORT, 0, 64),
        "no barrier before teams are added": Mistake(BARRIER, "", SHORT, 1, 64),
        "no barrier after teams are added": Mistake(BARRIER, "", WIDE, 2),
        "a merge that forgets the first parts": Mistake("total += simd_sum", "total = simd_sum", LONG, part_size=8),
        "a merge of equal weights": Mistake("exp2(log_total - peak)", "exp2(log_total * 0.0f)", SHORT, 0, 64),
    },
    "cuda": {
        "the keys of another head": Mistake("num_kv_heads + kv_head) * HEAD_DIM", "num_kv_heads) * HEAD_DIM", HALF),
        "the values of another head": Mistake("num_kv_heads + kv_head) * VALUE_DIM", "num_kv_heads) * VALUE_DIM", HALF),
        "the queries of another head": Mistake("(kv_head * HEADS + there", "(there", HALF),
        "a query that sees the next one": Mistake("distance >= 0", "distance >= -1", SEVERAL),
        "a query that sees too much": Mistake("distance < window_keys", "distance <= window_keys", SEVERAL),
        "the first query for all": Mistake("first_token + there / HEADS", "first_token", SEVERAL),
        "results of queries in each other's place": Mistake("row / HEADS * num_parts", "row / HEADS", SEVERAL, 0, 16),
        "a query too many": Mistake("num_rows = work[9 * item + 2] * HEADS", "num_rows = ROWS", SEVERAL),
        "a context that is one too long": Mistake("return key < end", "return key <= end", PLAIN),
        "a key past the end counts": Mistake("is_visible = key < end", "is_visible = key <= end", PLAIN),
        "the block after": Mistake("table[key >> block_shift]", "table[(key >> block_shift) + 1]", HALF),
        "a sink in every item": Mistake("part == 0 && ", "", HALF, part_size=80),
        "a sink in every warp": Mistake("warp == 0) {\n    UNROLL", "true) {\n    UNROLL", HALF),
        "no correction of the output": Mistake("[2 * r] *= correction", "[2 * r] *= 1.0f", ONE_GROUP),
        "no correction of the total": Mistake("total[r] *= correction", "total[r] *= 1.0f", ONE_GROUP),
        "rows 8 to 15 are forgotten": Mistake("ROWS > 8 ? 2 : 1", "1", Case(decodes(40), heads=(16, 1))),
        "a stage is used too early": Mistake("wait_for_copies<STAGES - 1>", "wait_for_copies<STAGES>", HALF, 0, 80),
        "a stage is filled too early": Mistake("__syncwarp();", "", ONE_GROUP, 0, 400),
        "a stage is read before other lanes' copies": Mistake("__syncwarp();", "", HALF, 1, 80),
        "no wait for the queries": Mistake("wait_for_copies<0>();", "", HALF, 0, 80),
        "no barrier after the queries": Mistake(SYNC, "", HALF, 0, 80),
        "no barrier before peaks": Mistake(SYNC, "", HALF, 1, 80),
        "no barrier after peaks": Mistake(SYNC, "", HALF, 2, 80),
        "no barrier before warps are added": Mistake(SYNC, "", HALF, 3, 80),
        "a merge that forgets the first items": Mistake(
            "total += own", "total = own", Case(decodes(1650), heads=(2, 1)), part_size=48
        ),
        "a merge of equal weights": Mistake("log_total_of(first + lane) - peak", "0.0f", HALF, part_size=80),
    },
}


@pytest.mark.slow
def test_planted_mistakes_are_noticed(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.unnoticed(MISTAKES[gpu.name], monkeypatch) == []


def test_without_a_mistake_the_same_cases_pass(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.check_without(MISTAKES[gpu.name], monkeypatch)
