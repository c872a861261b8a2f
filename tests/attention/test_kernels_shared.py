"""Decodes that share their first blocks: the kernels read those once, and everybody's result is as without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    share_all,
    split,
)
from helpers.gpu import Gpu
from helpers.planted import Mistake
from helpers.tiny_models import VOCAB_SIZE
from metalsim.fixture import Metal

from mlx_paged import LLM, BeamSearchParams, SamplingParams
from mlx_paged.attention import work_items as work_items
from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.attention.paged_attention import BACKEND_VARIABLE

# Two groups, one sequence that shares nothing, and one that is padding; then as many as make several tiles.
GROUPS = (((1, 70), (1, 81), (1, 66), (1, 34), (1, 0), (1, 47), (1, 40)), (((0, 1, 2), 4), ((5, 6), 2)))
ONE = (((1, 65), (1, 65)), (((0, 1), 4),))
MANY = (tuple((1, 33 + i) for i in range(19)), ((tuple(range(19)), 2),))

GRID: dict[str, list[Any]] = {
    "groups": [GROUPS, ONE, MANY],
    "heads": [(1, 1), (4, 2), (8, 1), (10, 2), (7, 1), (32, 2)],
    "head_dim": [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (40, 72)],
    "softcap": [None, 50.0],
    "sinks": [False, True],
    "dtype": list(DTYPES),
    "order": ["ascending", "descending"],
    "part_size": [None, 32],
}
POINTS = points_of(GRID, seed=7, reused=("head_dim", "softcap", "sinks", "dtype"))
NUM_PARTS = 3
BEAMS = Case(((1, 81), (1, 83), (1, 84)), (4, 2), shared=(((0, 1, 2), 4),), dtype="float32")


@pytest.fixture(autouse=True)
def short_prefixes_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    share_all(monkeypatch)


def case_of(point: Sequence[Any]) -> Case:
    (lengths, shared), heads, head_dim, softcap, sinks, dtype = point
    return Case(lengths, heads, head_dim, 16, None, softcap, sinks, dtype, shared=shared)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_it_equals_dense_attention_over_the_grid(part: int, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.take_part(part)

    def attend(arrays: Arrays, part_size: int | None) -> mx.array:
        with monkeypatch.context() as patches:
            split(patches, part_size)
            return arrays.attend(backend=gpu.name)

    points = [(*case_of(point[:-2]), *point[-2:]) for point in POINTS[part::NUM_PARTS]]
    check_points(points, attend, gpu)
    if gpu.simulated:
        assert gpu.kernels_run == ["decode", "prefill", "merge"] * len(points)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_members_than_a_tile_has_rows_for_share_a_prefix(dtype: str, gpu: Gpu) -> None:
    gpu.check(Case(tuple((1, 33 + i) for i in range(40)), (8, 2), shared=((tuple(range(40)), 2),), dtype=dtype))
    assert gpu.kernels_run == ["decode", "prefill", "merge"]


@pytest.mark.parametrize("block_size", [8, 16, 32, 64])
def test_blocks_of_any_size_are_shared(block_size: int, gpu: Gpu) -> None:
    lengths = tuple((1, block_size * 3 + extra) for extra in (1, 2, block_size))
    gpu.check(Case(lengths, (4, 2), block_size=block_size, shared=(((0, 1, 2), 3),), dtype="float32"))
    assert len(gpu.reports) == 3


def test_a_step_with_prompts_reads_the_prefix_of_its_decodes_once(gpu: Gpu) -> None:
    lengths = ((1, 81), (9, 30), (1, 83), (1, 84))
    gpu.check(BEAMS._replace(lengths=lengths, shared=(((0, 2, 3), 4),)))
    assert gpu.kernels_run == ["decode", "prefill", "merge", "prefill"]


@pytest.mark.parametrize(("heads", "part_size"), [((4, 2), None), ((4, 4), 32)])
def test_sequences_of_several_queries_share_what_all_of_these_see(
    heads: tuple[int, int], part_size: int | None, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    split(monkeypatch, part_size)
    lengths = ((2, 70), (8, 81), (4, 66), (3, 34), (1, 81), (1, 66))
    shared = (((0, 1, 2, 4, 5), 4),)
    arrays = make_arrays(Case(lengths, heads, sinks=True, dtype="float32", shared=shared))
    assert_close(arrays.attend(backend=gpu.name), dense_attention(arrays))
    assert gpu.kernels_run == ["decode", "prefill", "merge"] * 2  # of one query each, then of several
    read = gpu.reports[4].traffic.buffers
    assert read["members"].distinct_bytes_read == (2 + 8 + 4) * 4
    assert read["k_cache"].distinct_bytes_read == 48 * heads[1] * 64 * 4  # the third's first query sees 63 tokens


def test_heads_of_512_share_a_prefix_on_metal(metal: Metal) -> None:
    check(Case(((1, 81), (1, 66)), (8, 1), (512, 512), shared=(((0, 1), 4),)), backend="metal")
    assert [report.kernel.split("_")[1] for report in metal.reports] == ["decode", "prefill", "merge"]


def test_a_shared_prefix_is_read_once(gpu: Gpu) -> None:
    gpu.check(Case(((1, 81), (1, 83), (1, 84)), shared=(((0, 1, 2), 5),)))
    own, shared = (report.traffic.buffers["k_cache"].distinct_bytes_read for report in gpu.reports[:2])
    assert own == (1 + 3 + 4) * 2 * 64 * 2  # keys, KV heads, head_dim, bytes
    assert shared == 80 * 2 * 64 * 2


def test_with_a_window_every_sequence_reads_its_own_keys(gpu: Gpu) -> None:
    gpu.check(BEAMS._replace(window=70))
    assert gpu.kernels_run == ["decode"]


def test_nobody_looks_for_prefixes_unless_asked(gpu: Gpu) -> None:
    arrays = make_arrays(BEAMS)
    metadata = AttentionMetadata(arrays.block_tables, arrays.context_lens, arrays.cu_seqlens_q)
    out = gpu.backend.attend(arrays.q, arrays.pool, metadata, AttentionOptions(**arrays.options))
    assert_close(out, dense_attention(arrays))
    assert gpu.kernels_run == ["decode"]


@pytest.mark.parametrize("heads", [(4, 1), (8, 1)], ids=str)
def test_four_beams_read_little_more_than_the_distinct_blocks(
    heads: tuple[int, int], gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of 2048 tokens and 64 of each beam's own, divided as for 8 KV heads, of which one is run."""
    case = Case(((1, 2112),) * 4, heads, (128, 128), shared=(((0, 1, 2, 3), 128),))
    splits, keys = work_items.num_key_splits, work_items.keys_per_item
    monkeypatch.setattr(work_items, "num_key_splits", lambda *a: splits(*a[:2], a[2]._replace(num_kv_heads=8), *a[3:]))
    monkeypatch.setattr(work_items, "keys_per_item", lambda *a: keys(a[0], a[1]._replace(num_kv_heads=8), a[2]))
    gpu.check(case)
    decode, prefill, merge = (report.traffic for report in gpu.reports)
    distinct = (2048 + 4 * 64) * 2 * 128 * 2  # keys, K and V, head_dim, bytes
    caches = [traffic.buffers[name] for traffic in (decode, prefill) for name in ("k_cache", "v_cache")]
    # Metal's paged_decode reads a key again for 4 query heads more, in the same threadgroup.
    readers = [heads[0] // 4 if gpu.name == "metal" else 1] * 2 + [1, 1]
    read = sum(cache.bytes_read / times for cache, times in zip(caches, readers, strict=True))
    assert distinct <= read <= 1.01 * distinct
    parts = sum(traffic.buffers[name].bytes_written for traffic in (decode, prefill) for name in ("out", "lse"))
    parts += sum(merge.buffers[name].bytes_read for name in ("parts", "lse", "shared_parts", "shared_lse"))
    assert read + parts <= 1.1 * distinct
    lines = sum(cache.lines_read / times for cache, times in zip(caches, readers, strict=True))
    assert lines * 128 <= 1.05 * distinct
    assert prefill.threadgroups >= (4 if gpu.name == "metal" else 1)  # tiles of CUDA's are larger


# -- mistakes --

APART = BEAMS._replace(lengths=((1, 81), (1, 30), (1, 83), (1, 84)), shared=(((0, 2, 3), 4),))
TWO_GROUPS = Case(GROUPS[0], shared=GROUPS[1], sinks=True)
NOT_MERGED = Mistake("ranges[2 * query + 1] - ranges[2 * query]", "0", APART, part_size=32)
MISTAKES: dict[str, dict[str, Mistake]] = {
    "metal": {
        "the queries of others": Mistake("token = members[token]", "token = members[0] + token * 0", APART, 0, 32),
        "a causal mask": Mistake("SHARED ? 0 : 1", "1", APART, part_size=32),
        "a prefix that is not merged": NOT_MERGED,
        "another weight": Mistake(
            "shared_lse[size_t(shared_begin + i)", "shared_lse[size_t(shared_begin + i - 1)", APART, 1, part_size=32
        ),
        "one part twice": Mistake("ranges[2 * query] - num_own", "ranges[2 * query] - num_own - 1", APART, 0, 32),
    },
    "cuda": {
        "the queries of others": Mistake("token = members[token]", "token = members[0]", TWO_GROUPS, part_size=80),
        "a causal mask": Mistake("(SHARED ? 0 : (first_row + row)", "-((first_row + row)", TWO_GROUPS, part_size=80),
        "a prefix that is not merged": NOT_MERGED,
        "the shared parts of another": Mistake(
            "? ranges[2 * query] - num_own", "? ranges[0] - num_own", TWO_GROUPS, part_size=80
        ),
    },
}


@pytest.mark.slow
def test_planted_mistakes_are_noticed(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.unnoticed(MISTAKES[gpu.name], monkeypatch) == []


def test_without_a_mistake_the_same_cases_pass(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.check_without(MISTAKES[gpu.name], monkeypatch)


def test_the_engine_reads_shared_prompts_once_and_gives_the_same_tokens(
    gpu: Gpu, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples, beams, and requests that hit the prefix cache, beside one that shares nothing."""
    model = tiny_model("llama", num_hidden_layers=1)
    prompt = np.random.default_rng(3).integers(0, VOCAB_SIZE, 40).tolist()
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    drawn = SamplingParams(n=3, temperature=1, seed=5, max_tokens=6, ignore_eos=True)

    def outputs(backend: str) -> list[Any]:
        monkeypatch.setenv(BACKEND_VARIABLE, backend)
        llm = LLM.from_model(model, num_kv_blocks=64, pipelining="off")
        results = llm.generate([prompt, [1, 2, 3], [*prompt, 7], [*prompt, 8]], [drawn, greedy, greedy, greedy])
        beams = llm.beam_search([prompt], BeamSearchParams(beam_width=3, max_tokens=6))
        tokens = [[sample.token_ids for sample in result.outputs] for result in results]
        return [*tokens, [hypothesis.token_ids for hypothesis in beams[0].sequences]]

    expected = outputs("reference")
    assert outputs(gpu.name) == expected
    if gpu.simulated:
        prefixes = [report for report in gpu.reports if "members" in report.traffic.buffers]
        assert any(report.traffic.buffers["members"].bytes_read for report in prefixes)
