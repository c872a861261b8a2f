"""Decodes that share their first blocks, in Metal: those are read once, and everybody's result is as without."""

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
)
from helpers.planted import Mistake, plant
from helpers.tiny_models import VOCAB_SIZE
from metalsim.fixture import Metal

from mlx_paged import LLM, BeamSearchParams, SamplingParams
from mlx_paged.attention import paged_attention as attention
from mlx_paged.attention import shared_prefix as shared_prefix
from mlx_paged.attention import work_items as kernel_plan
from mlx_paged.attention.backend import AttentionOptions

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
    "is_split": [False, True],
}
POINTS = points_of(GRID, seed=7, reused=("head_dim", "softcap", "sinks", "dtype"))
NUM_PARTS = 3
BEAMS = Case(((1, 81), (1, 83), (1, 84)), (4, 2), shared=(((0, 1, 2), 4),), dtype="float32")


@pytest.fixture(autouse=True)
def short_prefixes_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefix, "LEAST_KEYS_SAVED", 1)


def kernels_run(metal: Metal) -> list[str]:
    return [report.kernel.split("_")[1] for report in metal.reports]


def split(patches: pytest.MonkeyPatch) -> None:
    """Have short contexts and prefixes split, too."""
    patches.setattr(kernel_plan, "_LEAST_KEYS_PER_ROW", 1)
    patches.setattr(kernel_plan, "keys_per_item", lambda *_: 32)
    patches.setattr(attention.BACKENDS["metal"], "num_cores", 10_000)


def case_of(point: Sequence[Any]) -> Case:
    (lengths, shared), heads, head_dim, softcap, sinks, dtype = point
    return Case(lengths, heads, head_dim, 16, None, softcap, sinks, dtype, shared=shared)


@pytest.mark.parametrize("part", range(NUM_PARTS))
@pytest.mark.slow
def test_it_equals_dense_attention_over_the_grid(part: int, metal: Metal, monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(arrays: Arrays, is_split: bool) -> mx.array:
        with monkeypatch.context() as patches:
            if is_split:
                split(patches)
            return arrays.attend(backend="metal")

    points = [(*case_of(point[:-2]), *point[-2:]) for point in POINTS[part::NUM_PARTS]]
    check_points(points, attend, metal)
    if metal.simulated:
        assert kernels_run(metal) == ["decode", "prefill", "merge"] * len(points)


@pytest.mark.parametrize("block_size", [8, 16, 32, 64])
def test_blocks_of_any_size_are_shared(block_size: int, metal: Metal) -> None:
    lengths = tuple((1, block_size * 3 + extra) for extra in (1, 2, block_size))
    check(Case(lengths, (4, 2), block_size=block_size, shared=(((0, 1, 2), 3),), dtype="float32"), backend="metal")
    assert len(metal.reports) == 3


def test_a_step_with_prompts_reads_the_prefix_of_its_decodes_once(metal: Metal) -> None:
    lengths = ((1, 81), (9, 30), (1, 83), (1, 84))
    check(BEAMS._replace(lengths=lengths, shared=(((0, 2, 3), 4),)), backend="metal")
    assert kernels_run(metal) == ["decode", "prefill", "merge", "prefill"]


def test_with_a_window_every_sequence_reads_its_own_keys(metal: Metal) -> None:
    check(BEAMS._replace(window=70), backend="metal")
    assert kernels_run(metal) == ["decode"]


def test_nobody_looks_for_prefixes_unless_asked(metal: Metal) -> None:
    arrays = make_arrays(BEAMS)
    metadata = attention.AttentionMetadata(arrays.block_tables, arrays.context_lens, arrays.cu_seqlens_q)
    out = attention.attend(*arrays[:3], metadata, AttentionOptions(**arrays.options), "metal")
    assert_close(out, dense_attention(arrays))
    assert kernels_run(metal) == ["decode"]


@pytest.mark.parametrize("heads", [(4, 1), (8, 1)], ids=str)
def test_four_beams_read_little_more_than_the_distinct_blocks(
    heads: tuple[int, int], metal: Metal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of 2048 tokens and 64 of each beam's own, divided as for 8 KV heads, of which one is run."""
    case = Case(((1, 2112),) * 4, heads, (128, 128), shared=(((0, 1, 2, 3), 128),))
    items, keys = kernel_plan.num_key_splits, kernel_plan.keys_per_item
    monkeypatch.setattr(kernel_plan, "num_key_splits", lambda *a: items(*a[:2], a[2]._replace(num_kv_heads=8), a[3]))
    monkeypatch.setattr(kernel_plan, "keys_per_item", lambda *a: keys(a[0], a[1]._replace(num_kv_heads=8), a[2]))
    check(case, backend="metal")
    decode, prefill, merge = (report.traffic for report in metal.reports)
    distinct = (2048 + 4 * 64) * 2 * 128 * 2  # keys, K and V, head_dim, bytes
    caches = [traffic.buffers[name] for traffic in (decode, prefill) for name in ("k_cache", "v_cache")]
    read = sum(cache.bytes_read for cache in caches)
    assert distinct <= read <= 1.01 * distinct
    parts = sum(traffic.buffers[name].bytes_written for traffic in (decode, prefill) for name in ("out", "lse"))
    parts += sum(merge.buffers[name].bytes_read for name in ("parts", "lse", "shared_parts", "shared_lse"))
    assert read + parts <= 1.1 * distinct
    assert sum(cache.lines_read for cache in caches) * 128 <= 1.05 * distinct
    assert prefill.threadgroups >= 4


MISTAKES = {
    "the queries of others": Mistake("token = members[token]", "token = members[0] + token * 0"),
    "a causal mask": Mistake("first_position + (SHARED ? 0 : query)", "first_position - num_queries + query"),
    "a prefix that is not merged": Mistake("ranges[2 * query + 1] - ranges[2 * query]", "0"),
    "another weight": Mistake("shared_lse[size_t(shared_begin + i)", "shared_lse[size_t(shared_begin + i - 1)", 1),
    "one part twice": Mistake("ranges[2 * query] - num_own", "ranges[2 * query] - num_own - 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_noticed(name: str, metal: Metal, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = plant(MISTAKES[name], metal, monkeypatch)
    split(monkeypatch)
    with pytest.raises(Exception, match=r"Mismatch|out-of-bounds|isfinite|norm"):
        check(BEAMS._replace(lengths=((1, 81), (1, 30), (1, 83), (1, 84)), shared=(((0, 2, 3), 4),)), backend="metal")
    assert planted


def test_without_a_mistake_the_same_case_passes(metal: Metal, monkeypatch: pytest.MonkeyPatch) -> None:
    split(monkeypatch)
    check(BEAMS._replace(lengths=((1, 81), (1, 30), (1, 83), (1, 84)), shared=(((0, 2, 3), 4),)), backend="metal")


def test_the_engine_reads_shared_prompts_once_and_gives_the_same_tokens(
    metal: Metal, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples, beams, and requests that hit the prefix cache, beside one that shares nothing."""
    model = tiny_model("llama", num_hidden_layers=1)
    prompt = np.random.default_rng(3).integers(0, VOCAB_SIZE, 40).tolist()
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    drawn = SamplingParams(n=3, temperature=1, seed=5, max_tokens=6, ignore_eos=True)

    def outputs(backend: str) -> list[Any]:
        monkeypatch.setenv(attention.BACKEND_VARIABLE, backend)
        llm = LLM.from_model(model, num_kv_blocks=64)
        results = llm.generate([prompt, [1, 2, 3], [*prompt, 7], [*prompt, 8]], [drawn, greedy, greedy, greedy])
        beams = llm.beam_search([prompt], BeamSearchParams(beam_width=3, max_tokens=6))
        tokens = [[sample.token_ids for sample in result.outputs] for result in results]
        return [*tokens, [hypothesis.token_ids for hypothesis in beams[0].sequences]]

    expected = outputs("reference")
    assert outputs("metal") == expected
    if metal.simulated:
        prefixes = [report for report in metal.reports if "members" in report.traffic.buffers]
        assert any(report.traffic.buffers["members"].bytes_read for report in prefixes)
