"""metal/paged_decode.metal and paged_merge.metal: agreement with float64, traffic, and that mistakes are noticed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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

from mlx_paged.attention import metal as metal_module
from mlx_paged.attention import paged_attention as attention
from mlx_paged.attention import work_items as kernel_plan
from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.kernel_backend import shape_of
from mlx_paged.attention.work_items import DecodeLayout, Shape

METAL: Any = attention.BACKENDS["metal"]


def decodes(*context_lens: int) -> tuple[tuple[int, int], ...]:
    """The lengths of a case with one query per sequence."""
    return tuple((1, context) for context in context_lens)


GRID: dict[str, list[Any]] = {
    "lengths": [
        decodes(54),
        decodes(1, 15, 16, 17, 54, 97, 33),
        decodes(*range(30, 47)),
        decodes(70, 0, 33),
        decodes(1023, 1025),
        decodes(4097),
    ],
    "heads": [(8, 8), (32, 8), (40, 40), (14, 2), (6, 1), (5, 1), (16, 1)],
    "head_dim": [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (64, 32)],
    "block_size": [8, 16, 32, 64],
    "window": [None, 1, 33, 256],
    "softcap": [None, 50.0],
    "sinks": [False, True],
    "dtype": list(DTYPES),
    "order": ["ascending", "descending"],
    "part_size": [None, 64],
}
POINTS = points_of(GRID, seed=2)
NUM_PARTS = 4


def split(monkeypatch: pytest.MonkeyPatch, part_size: int | None) -> None:
    """Have contexts computed in parts of so many keys; None: as it is decided."""
    if part_size is not None:
        monkeypatch.setattr(kernel_plan, "keys_per_item", lambda *_: part_size)


@pytest.mark.parametrize("part", range(NUM_PARTS))
@pytest.mark.slow
def test_it_equals_dense_attention_over_the_grid(part: int, metal: Metal, monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(arrays: Arrays, part_size: int | None) -> mx.array:
        with monkeypatch.context() as patches:
            split(patches, part_size)
            return arrays.attend(backend="metal")

    check_points(POINTS[part::NUM_PARTS], attend, metal)


@pytest.mark.parametrize("context", [4095, 4096, 4097])
def test_contexts_about_a_power_of_two_are_split_and_merged(context: int, metal: Metal) -> None:
    check(Case(decodes(context), heads=(6, 1), block_size=32, dtype="float32"), backend="metal")
    assert len(metal.reports) == 2


def test_more_parts_than_lanes_are_merged(metal: Metal, monkeypatch: pytest.MonkeyPatch) -> None:
    split(monkeypatch, 32)
    check(Case(decodes(1100, 3), heads=(2, 1), sinks=True, dtype="float32"), backend="metal")
    assert [report.kernel.split("_")[1] for report in metal.reports] == ["decode", "merge"]


def test_a_context_of_nothing_gives_zeros(metal: Metal) -> None:
    out = make_arrays(Case(decodes(0, 9, 0))).attend(backend="metal")
    assert not out[0].any() and not out[2].any() and out[1].any()


def test_blocks_outside_the_window_are_never_read(metal: Metal) -> None:
    arrays = make_arrays(Case(decodes(200, 49), window=33))
    tables = np.array(arrays.block_tables)
    tables[0, : 167 // 16] = tables[1, : 16 // 16] = 2**26  # reading there would be out of bounds
    # The public function would refuse these ids.
    metadata = attention.AttentionMetadata(mx.array(tables), arrays.context_lens, arrays.cu_seqlens_q)
    out = attention.attend(*arrays[:3], metadata, AttentionOptions(**arrays.options), "metal")
    assert_close(out, dense_attention(arrays))
    read = metal.report.traffic.buffers["k_cache"].bytes_read
    assert read == 2 * 33 * 2 * 64 * 2  # sequences, keys, KV heads, head_dim, bytes


def test_rows_of_queries_and_tables_may_have_any_stride(metal: Metal) -> None:
    arrays = make_arrays(Case(decodes(40, 0, 33), heads=(6, 2), dtype="float32"))
    metadata = attention.AttentionMetadata(arrays.block_tables, arrays.context_lens, arrays.cu_seqlens_q)
    plan = METAL.plan_decode(metadata.context_lens, None, shape_of(*arrays[:3]))
    q = mx.concatenate([arrays.q + 1, arrays.q, arrays.q - 1], axis=2)[:, :, 64:128]
    tables = mx.concatenate([arrays.block_tables] * 3, axis=1)[:, 8:16]
    out = METAL.decode(q, arrays.k_cache, arrays.v_cache, tables, plan, AttentionOptions(arrays.options["scale"]))
    assert_close(out, dense_attention(arrays))


class Read(NamedTuple):
    """Shapes whose traffic is counted: query heads per KV head, head_dim, dtype."""

    ratio: int
    head_dim: int
    dtype: str


@pytest.mark.parametrize(
    "read",
    [
        Read(1, 64, "float16"),
        Read(4, 64, "float16"),
        Read(4, 128, "float16"),
        Read(4, 128, "float32"),
        Read(8, 128, "bfloat16"),
        Read(16, 128, "bfloat16"),
        Read(16, 256, "float16"),
    ],
    ids=str,
)
def test_keys_and_values_are_read_once_in_whole_lines(read: Read, metal: Metal) -> None:
    """Batch 1, 4096 keys, divided as for 8 KV heads, of which one is run."""
    dtype, num_keys = DTYPES[read.dtype], 4096
    shape = Shape(8, read.ratio, read.head_dim, read.head_dim, dtype.size)
    plan = METAL.plan_decode(np.array([num_keys], np.int32), None, shape)
    pool = mx.random.normal((256, 16, 1, read.head_dim)).astype(dtype)
    tables = mx.array(np.random.default_rng(0).permutation(256).astype(np.int32)[None])
    q = mx.random.normal((1, read.ratio, read.head_dim)).astype(dtype)
    METAL.decode(q, pool, pool + 0, tables, plan, AttentionOptions(0.1))
    decode, merge = (report.traffic for report in metal.reports)
    compulsory = num_keys * read.head_dim * dtype.size
    for name in ("k_cache", "v_cache"):
        assert decode.buffers[name].distinct_bytes_read == compulsory
        assert decode.buffers[name].bytes_read <= 1.01 * compulsory
        assert decode.buffers[name].lines_read * 128 <= 1.05 * compulsory
    assert decode.threadgroups * 8 >= 64
    written = decode.buffers["out"].bytes_written + decode.buffers["lse"].bytes_written
    partial = written + merge.buffers["parts"].bytes_read + merge.buffers["lse"].bytes_read
    # With more than 9 query heads to a KV head, 64 threadgroups and 2% exclude each other at this length.
    assert partial <= (0.02 if read.ratio <= 9 else 0.033) * 2 * compulsory
    assert decode.threadgroup_memory <= 32 << 10
    assert decode.threads // decode.threadgroups <= 1024


class Setting(NamedTuple):
    """A case in which a mistake must be noticed. part_size: keys of a part."""

    case: Case
    part_size: int | None = None
    layout: DecodeLayout | None = None


SMALL = Setting(Case(decodes(150, 20), (4, 2), (32, 32), sinks=True, window=140, dtype="float32"), 64)
LONG = Setting(Case(decodes(400), (4, 2), (32, 32), dtype="float32"), 1024)
# As many query heads of a great size have it.
TEAMS_OF_TWO = Setting(LONG.case._replace(head_dim=(64, 64)), 1024, DecodeLayout(32, 2, 1, 4, False, 0))
MANY_PARTS = LONG._replace(part_size=8)
WIDE = Setting(Case(decodes(60), (4, 1), (32, 128), dtype="float32"))  # teams are added for two heads at a time
KV_ROW = "(size_t(metal::max(row, 0)) * num_kv_heads + kv_head)"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
MISTAKES: dict[str, tuple[Mistake, Setting]] = {
    "the keys of another head": (Mistake(KV_ROW, KV_ROW.replace("kv_head)", "0)")), SMALL),
    "the values of another head": (Mistake(KV_ROW, KV_ROW.replace("kv_head)", "0)"), 1), SMALL),
    "the queries of another head": (Mistake("+ kv_head * HEADS * q_strides[1]", ""), SMALL),
    "a window that is one too short": (Mistake("const int key = begin", "const int key = begin + 1"), SMALL),
    "a context that is one too long": (Mistake("key < end", "key <= end"), SMALL),
    "the block after": (Mistake("table[key >> block_shift]", "table[(key >> block_shift) + 1]"), SMALL),
    "a sink in every part": (Mistake("is_first && ", ""), SMALL),
    "a sink in every team": (Mistake("team == 0 && ", ""), SMALL),
    "no correction of the output": (Mistake("*= correction;", "*= 1.0f;"), LONG),
    "no correction of the total": (Mistake("total * correction + sum", "total + sum"), LONG),
    "a lane too few in the sums": (Mistake("offset < lanes", "offset < lanes / 2"), SMALL),
    "a weight of another key": (Mistake("simd_shuffle(scores[g], row_lanes +", "simd_shuffle(scores[g], "), SMALL),
    "no barrier after the queries": (Mistake(BARRIER, "", 0), TEAMS_OF_TWO),
    "no barrier before scores are added": (Mistake(BARRIER, "", 1), TEAMS_OF_TWO),
    "no barrier after scores are added": (Mistake(BARRIER, "", 2), TEAMS_OF_TWO),
    "no barrier after peaks": (Mistake(BARRIER, "", 3), SMALL),
    "no barrier before teams are added": (Mistake(BARRIER, "", 4), SMALL),
    "no barrier after teams are added": (Mistake(BARRIER, "", 5), WIDE),
    "a merge that forgets the first parts": (Mistake("total += simd_sum", "total = simd_sum"), MANY_PARTS),
    "a merge of equal weights": (Mistake("exp2(log_total - peak)", "exp2(log_total * 0.0f)"), SMALL),
}


def run_setting(setting: Setting, metal: Metal, patches: pytest.MonkeyPatch) -> None:
    split(patches, setting.part_size)
    if setting.layout is not None:
        patches.setattr(metal_module, "decode_layout", lambda _: setting.layout)
    check(setting.case, backend="metal")


@pytest.mark.slow
def test_planted_mistakes_are_noticed(metal: Metal, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_noticed(mistake: Mistake, setting: Setting) -> bool:
        with monkeypatch.context() as patches:
            planted = plant(mistake, metal, patches)
            try:
                run_setting(setting, metal, patches)
            except AssertionError:  # a SimulationError is one
                return True
            finally:
                assert planted
        return False

    metal.compile_ahead(lambda: [is_noticed(*planted) for planted in MISTAKES.values()])
    assert [name for name, planted in MISTAKES.items() if not is_noticed(*planted)] == []


@pytest.mark.parametrize("setting", [SMALL, LONG, TEAMS_OF_TWO, MANY_PARTS, WIDE])
def test_without_a_mistake_the_same_cases_pass(setting: Setting, metal: Metal, monkeypatch: pytest.MonkeyPatch) -> None:
    run_setting(setting, metal, monkeypatch)


def steps() -> list[Sequence[tuple[int, int]]]:
    """(queries, context) of steps with decodes and prompts."""
    return [
        ((1, 40), (7, 20), (1, 33), (1, 0), (16, 17)),
        ((20, 20), (1, 40)),
        ((1, 40), (2, 2)),
    ]


@pytest.mark.parametrize("lengths", steps())
def test_steps_with_decodes_and_prompts_come_back_in_the_order_of_their_tokens(
    lengths: Sequence[tuple[int, int]], metal: Metal
) -> None:
    check(Case(lengths, dtype="float32"), backend="metal")
    assert {report.kernel.split("_")[1] for report in metal.reports} == {"decode", "prefill"}
