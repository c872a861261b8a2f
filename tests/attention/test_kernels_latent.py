"""paged_latent, Metal's and CUDA's: agreement with float64, traffic, and that mistakes are noticed."""

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
    pairwise_cover,
    split,
    strided,
)
from helpers.budget import LONG, budget
from helpers.gpu import Gpu
from helpers.planted import Mistake

from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.kernel_backend import shape_of
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.attention.paged_attention import choose_backend
from mlx_paged.attention.shared_prefix import SharedPrefix
from mlx_paged.cache.layer_spec import LayerSpec

DEEPSEEK, SMALL, TINY = (576, 512), (288, 256), (24, 16)  # head sizes of keys and of values


def latents(lengths: Any, heads: int, dims: tuple[int, int] = DEEPSEEK, **changes: Any) -> Case:
    return Case(lengths, (heads, 1), dims, latent=True, **changes)


CASES = {
    "decodes of few heads": latents(decodes(15, 1, 300), 5),
    "decodes of many heads": latents(decodes(17, 70), 128, dtype="bfloat16"),
    "some tokens of prompts": latents(((3, 40), (1, 16), (0, 20), (1, 0)), 20),
    "a window": latents(((2, 60), (1, 33)), 10, SMALL, window=33, dtype="bfloat16"),
    "large blocks": latents(decodes(70, 0, 3), 8, SMALL, block_size=64),
    "all that other layers have": latents(((5, 90), (1, 17)), 16, TINY, softcap=50.0, sinks=True, window=70),
}


@pytest.mark.parametrize("name", CASES)
def test_it_equals_dense_attention(name: str, gpu: Gpu) -> None:
    gpu.check(CASES[name])
    assert gpu.kernels_run == ["latent", "merge"] or gpu.kernels_run == ["latent"]


@pytest.mark.skipif(not LONG, reason="it takes half a minute for each")
def test_it_equals_dense_attention_over_the_grid(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(arrays: Arrays, part_size: int | None) -> mx.array:
        with monkeypatch.context() as patches:
            split(patches, part_size)
            return arrays.attend(backend=gpu.name)

    lengths = [decodes(1, 15, 16, 17, 300), ((5, 40), (2, 17), (1, 33), (0, 20), (1, 0), (3, 3)), ((19, 19),)]
    grid: dict[str, list[Any]] = {
        "lengths": lengths,
        "heads": [(heads, 1) for heads in (5, 8, 10, 16, 20, 64, 128)],
        "head_dim": [DEEPSEEK, SMALL, TINY, (192, 128)],
        "block_size": [8, 16, 32, 64],
        "window": [None, 1, 5, 33],
        "softcap": [None, 50.0],
        "sinks": [False, True],
        "dtype": ["float16", "bfloat16"] + ["float32"] * (gpu.name == "metal"),
        "consecutive": [False],
        "shared": [()],
        "latent": [True],
        "order": ["ascending", "descending"],
        "part_size": [None, 80],
    }
    check_points(pairwise_cover(grid, 5, reused=("head_dim", "softcap", "sinks", "dtype")), attend, gpu)


@pytest.mark.parametrize("order", ["random", "descending"])
def test_the_order_of_threads_does_not_matter(order: str, gpu: Gpu) -> None:
    gpu.configure(order=order)
    gpu.check(CASES["some tokens of prompts"])


@pytest.mark.parametrize(("heads", "most"), [(5, 1), (10, 1), (16, 1), (20, 2), (40, 3)])
def test_each_row_is_read_once_for_up_to_16_heads(heads: int, most: int, gpu: Gpu) -> None:
    arrays = make_arrays(latents(decodes(320), heads))
    arrays.attend(backend=gpu.name)
    traffic, rows = gpu.reports[0].traffic, gpu.backend.latent_layout(shape_of(arrays.q, arrays.pool)).tile.rows
    assert traffic.buffers["k_cache"].distinct_bytes_read == 320 * 576 * 2
    assert traffic.buffers["k_cache"].bytes_read == 320 * 576 * 2 * -(-heads // rows) <= 320 * 576 * 2 * most
    assert traffic.threadgroup_memory <= (32 if gpu.name == "metal" else 96) << 10


def test_the_queries_of_a_prompt_share_a_read_of_the_keys_before_them(gpu: Gpu) -> None:
    arrays = make_arrays(latents(((4, 320),), 4))
    arrays.attend(backend=gpu.name)
    traffic = gpu.reports[0].traffic
    assert traffic.buffers["k_cache"].bytes_read == 320 * 576 * 2
    assert traffic.buffers["q"].bytes_read == arrays.q.nbytes * traffic.threadgroups


def test_one_sequence_is_work_for_many_threadgroups_and_many_are_not_split(gpu: Gpu) -> None:
    shape = shape_of(mx.zeros((1, 16, 576), mx.float16), make_arrays(latents(decodes(1), 16)).pool)

    def num_items(*contexts: int) -> int:
        starts = np.arange(len(contexts) + 1, dtype=np.int32)
        return gpu.backend.plan_prefill(np.array(contexts, np.int32), starts, None, shape).num_items

    assert num_items(4096) == 32 and num_items(100) == 1 and num_items(*[1000] * 400) == 400


def test_sequences_that_share_blocks_read_them_each_on_its_own(gpu: Gpu) -> None:
    arrays = make_arrays(latents(decodes(40, 45), 10, SMALL, shared=(((0, 1), 2),)))
    metadata = AttentionMetadata(*arrays[3:6], lambda _: [SharedPrefix(np.arange(2), 32)])
    out = gpu.backend.attend(arrays.q, arrays.pool, metadata, AttentionOptions(**arrays.options))
    assert_close(out, dense_attention(arrays))
    assert gpu.kernels_run == ["latent"]


def test_blocks_outside_the_window_are_not_looked_up(gpu: Gpu) -> None:
    arrays = make_arrays(latents(((2, 160), (1, 49)), 10, SMALL, window=33))
    tables = np.array(arrays.block_tables)
    for table, (queries, context) in zip(tables, ((2, 160), (1, 49)), strict=True):
        table[: (context - queries + 1 - 33) // 16] = 2**26  # reading there would be out of bounds
    out = arrays._replace(block_tables=mx.array(tables)).attend(backend=gpu.name)
    assert_close(out, dense_attention(arrays))


def test_rows_of_queries_and_tables_may_have_any_stride(gpu: Gpu) -> None:
    arrays = make_arrays(latents(((7, 30), (2, 20)), 8, SMALL))
    assert_close(strided(arrays).attend(backend=gpu.name), dense_attention(arrays))


def test_offsets_have_64_bits(gpu: Gpu) -> None:
    gpu.only_simulated("memory that is not there is read")
    arrays = make_arrays(latents(decodes(3), 8))
    with pytest.raises(AssertionError, match=found_far("read")):
        arrays._replace(block_tables=mx.full((1, 8), FAR_BLOCK, mx.int32)).attend(backend=gpu.name)


def test_a_step_without_queries_needs_no_kernel(gpu: Gpu) -> None:
    out = make_arrays(latents(((0, 16),), 8)).attend(backend=gpu.name)
    assert out.shape == (0, 8, 512) and not gpu.kernels_run


# -- which rows --


@pytest.mark.parametrize(
    ("dims", "dtype", "kinds"),
    [
        (DEEPSEEK, "bfloat16", "metal, cuda"),
        (SMALL, "float16", "metal, cuda"),
        (DEEPSEEK, "float32", "metal"),
        ((504, 440), "float16", "cuda"),
        ((1088, 1024), "float16", "metal"),
        ((60, 52), "float16", ""),
    ],
)
def test_a_layer_without_a_kernel_is_told_why(dims: tuple[int, int], dtype: str, kinds: str, gpu: Gpu) -> None:
    layer = LayerSpec(1, *dims, DTYPES[dtype], value_in_key=True)
    if gpu.name in kinds:
        assert choose_backend(layer, 20, 16, gpu.name) is gpu.backend
        return
    message = f"^no (Metal|CUDA) kernel for latents of {dims[1]} and rotated keys of {dims[0] - dims[1]} numbers of"
    with pytest.raises(ValueError, match=message):
        choose_backend(layer, 20, 16, gpu.name)


def test_metal_computes_float32(gpu: Gpu) -> None:
    if gpu.name == "metal":
        gpu.check(latents(((3, 20), (1, 40)), 10, dtype="float32"))


# -- mistakes --

DECODE = latents(decodes(150, 20), 10, SMALL)
CHUNK = latents(((5, 90), (2, 20)), 10, SMALL)
LARGE = DECODE._replace(dtype="bfloat16")
WINDOWED = CHUNK._replace(window=33)
SINKS = CHUNK._replace(sinks=True)
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SYNC = "__syncthreads();"
MISTAKES: dict[str, dict[str, Mistake]] = {
    "metal": {
        "a key of the future is visible": Mistake("distance >= 0", "distance >= -1", CHUNK),
        "the window is one too long": Mistake("distance < window", "distance <= window", WINDOWED),
        "no correction of the output": Mistake("output[r][j] *= correction", "output[r][j] *= 1", DECODE),
        "queries that are not transposed": Mistake("lane_of(column + c, row)", "lane_of(row, column + c)", DECODE),
        "no barrier before scores are added": Mistake(BARRIER, "", DECODE, 0),
        "no barrier before values": Mistake(BARRIER, "", DECODE, 1),
        "no barrier before factors": Mistake(BARRIER, "", DECODE, 2),
        "no barrier after factors": Mistake(BARRIER, "", DECODE, 3),
        "the window begins one too late": Mistake("group + 1 - window", "group + 2 - window", WINDOWED),
        "the last key is missing": Mistake("last_key + 1)", "last_key)", CHUNK),
        "parts overlap": Mistake("part * rounds", "part * (rounds - 1)", CHUNK, part_size=48),
        "each part has the sink": Mistake(" && part == 0", "", SINKS, part_size=48),
        "the queries of another head": Mistake("group + row % group", "group + row % 7", CHUNK),
        "the same keys again": Mistake("first + TILE_KEYS + g * 8", "first + g * 8", DECODE),
        "no correction of the total": Mistake("totals[i] * correction +", "totals[i] +", DECODE),
        "a lane too few in the peaks": Mistake("mask = TILE_KEYS / 2", "mask = TILE_KEYS / 4", LARGE),
        "rows past the eighth are forgotten": Mistake("r * 8 < num_rows", "r < 1", DECODE, 1),
    },
    "cuda": {
        "a key of the future is visible": Mistake("distance >= 0", "distance >= -1", CHUNK),
        "the window is one too long": Mistake("distance < window_keys", "distance <= window_keys", WINDOWED),
        "no correction of the output": Mistake("*= of_rows[c / 2]", "*= 1.0f", DECODE),
        "a row of matrix b": Mistake("lane / 16 * 8) * KEY_STRIDE", "lane / 16 * 4) * KEY_STRIDE", DECODE),
        "no wait for the queries": Mistake("wait_for_copies<1>();", "", DECODE),
        "no wait for keys": Mistake("wait_for_copies<0>();", "", DECODE),
        "no barrier after the queries": Mistake(SYNC, "", DECODE, 0),
        "no barrier before scores": Mistake(SYNC, "", DECODE, 1),
        "no barrier before scores are added": Mistake(SYNC, "", DECODE, 2),
        "no barrier before values": Mistake(SYNC, "", DECODE, 3),
        "no barrier before factors": Mistake(SYNC, "", DECODE, 4),
        "no barrier after factors": Mistake(SYNC, "", DECODE, 5),
        "the window begins one too late": Mistake("+ 1 - window_keys", "+ 2 - window_keys", WINDOWED),
        "the last key is missing": Mistake("last_key + 1)", "last_key)", CHUNK),
        "parts overlap": Mistake("part * rounds", "part * (rounds - 1)", CHUNK, part_size=48),
        "each part has the sink": Mistake(" && part == 0", "", SINKS, part_size=48),
        "the queries of another head": Mistake("group + from_row % group", "group + from_row % 7", CHUNK),
        "no correction of the total": Mistake("total *= correction", "total *= 1.0f", DECODE),
        "a lane too few in the peaks": Mistake("mask = 4", "mask = 2", LARGE),
        "the stage that is read is filled": Mistake("stages + stage * STAGE, k_cache", "stages, k_cache", DECODE),
    },
}


@pytest.mark.slow
def test_planted_mistakes_are_noticed(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    some = dict(list(MISTAKES[gpu.name].items())[: budget(5, 100)])
    assert gpu.unnoticed(some, monkeypatch) == []
    gpu.check_without(some, monkeypatch)
