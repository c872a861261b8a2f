"""How the benchmarks of attention and of kernels measure: what is timed, what is compared, what is left out."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Callable
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from helpers.run_benchmark import RESULTS
from metalsim.fixture import Metal

from mlx_paged import paged_attention
from mlx_paged.attention.metal import MetalBackend
from mlx_paged.attention.paged_attention import BACKENDS
from mlx_paged.attention.work_items import Shape

needs_the_simulator = pytest.mark.skipif(sys.platform != "linux", reason="the simulator runs on Linux")


@pytest.mark.parametrize(
    ("wrong", "verdict"),
    [
        (lambda out: out * 1.001, "NOT paged"),
        (lambda out: mx.roll(out, 1, axis=1), "NOT paged"),  # another head's
        (lambda out: mx.where(mx.arange(out.shape[0])[:, None, None] == 2, mx.nan, out), "NOT paged"),
        (lambda out: out, "yes"),
    ],
)
def test_a_wrong_result_is_reported_beside_its_time(
    wrong: Callable[[mx.array], mx.array], verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = importlib.import_module("attention_layers")
    backend = BACKENDS["reference"]
    mistaken = SimpleNamespace(name="mistaken", attend=lambda *arguments: wrong(backend.attend(*arguments)))
    monkeypatch.setattr(benchmark, "choose_backend", lambda *_: mistaken)
    heads = benchmark.Heads(6, 2, 32, mx.float32)
    row = benchmark.compare(benchmark.Case(heads, 3, 37), benchmark.with_dense, quick=True)
    assert row["agrees"] == verdict
    assert row["paged_us"] > 0 and row["contiguous_error"] < 2e-5


def test_block_tables_of_a_case_share_the_prefix_and_nothing_else() -> None:
    case = importlib.import_module("attention_layers").Case(None, batch=3, context=85, prefix=32)
    consecutive, scattered, shared = case.tables().values()
    assert consecutive.ravel().tolist() == list(range(3 * 6))
    assert sorted(scattered.ravel()) == list(range(3 * 6)) and scattered.tolist() != consecutive.tolist()
    assert (shared[:, :2] == scattered[0, :2]).all() and (shared[:, 2:] == scattered[:, 2:]).all()
    assert case.distinct_tokens() == 32 + 3 * 53


def test_each_call_of_a_chain_takes_the_results_of_the_one_before_and_the_next_layer() -> None:
    benchmark = importlib.import_module("attention_layers")
    calls = []

    def call(queries: mx.array, layer: int) -> mx.array:
        calls.append((queries, layer))
        return queries + 1

    assert benchmark.seconds_of_call(benchmark.Contender(mx.zeros(1), call, num_layers=3), num_calls=5) > 0
    assert [(queries.item(), layer) for queries, layer in calls] == [(0, 0), (1, 1), (2, 2), (3, 0), (4, 1)]


@pytest.mark.parametrize("num_queries", [1, 5])
def test_kernels_are_what_is_timed_where_there_is_a_metal_device(num_queries: int, metal: Metal) -> None:
    benchmark = importlib.import_module("attention_layers")
    case = benchmark.Case(benchmark.Heads(6, 2, 64, mx.float16), 2, 37, num_queries=num_queries)
    row = benchmark.compare(case, benchmark.with_dense, quick=True)
    assert row["backend"] == "metal" and row["agrees"] == "yes"
    name = "paged_decode" if num_queries == 1 else "paged_prefill"
    assert all(report.kernel.startswith(name) for report in metal.reports)
    assert len(metal.reports) > 3 * 2  # more than one chain of calls


def test_shapes_that_memory_does_not_hold_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = importlib.import_module("attention_layers")
    case = benchmark.Case(benchmark.Heads(32, 8, 128, mx.float16), 4, 1000)
    kv_bytes = 4 * 1000 * 8 * 128 * 2 * 2
    monkeypatch.setattr(benchmark, "device_limit", lambda: (10 * kv_bytes, "RAM"))
    assert case.num_layers() == 1
    monkeypatch.setattr(benchmark, "device_limit", lambda: (6 * kv_bytes, "RAM"))
    assert case.num_layers() == 0
    assert benchmark.compare(case, benchmark.with_dense, quick=True) is None
    assert "left out for want of memory: 32/8 x 128, batch 4, 1 of 1,000 tokens" in capsys.readouterr().err


@needs_the_simulator
def test_one_kv_head_stands_for_all() -> None:
    benchmark = importlib.import_module("kernel_traffic")
    heads, batch, context = benchmark.Heads(6, 3, 64), 2, 700
    row = benchmark.count_decode(heads, batch, context)
    q = mx.random.normal((batch, 6, 64), mx.float16)
    pool = mx.random.normal((2 * 44, 16, 3, 64), mx.float16)
    tables = np.random.default_rng(0).permutation(2 * 44).astype(np.int32).reshape(2, 44)
    lengths = np.full(batch, context, np.int32), np.arange(batch + 1, dtype=np.int32)
    decode, merge = benchmark.launches(
        lambda: paged_attention(q, pool, pool + 0, tables, *lengths, scale=1.0, backend="metal")
    )
    kv_bytes = 2 * batch * context * 3 * 64 * 2
    caches = [decode.traffic.buffers[name] for name in ("k_cache", "v_cache")]
    partial = [decode.traffic.buffers[name].bytes_written for name in ("out", "lse")]
    partial += [merge.traffic.buffers[name].bytes_read for name in ("parts", "lse")]
    assert row["kv_bytes"] == kv_bytes
    assert row["threadgroups"] == decode.traffic.threadgroups > 2 * 3
    assert row["read"] * kv_bytes == sum(cache.bytes_read for cache in caches)
    assert row["lines"] * kv_bytes == 128 * sum(cache.lines_read for cache in caches)
    assert row["partial"] * kv_bytes == pytest.approx(sum(partial))
    assert row["barriers"] * batch * context * 3 == pytest.approx(decode.traffic.barriers)
    assert row["simdgroup_functions"] * batch * context * 3 == pytest.approx(decode.traffic.collectives)


@needs_the_simulator
def test_a_thread_of_decode_keeps_at_most_72_words_whatever_the_shape() -> None:
    register_words = importlib.import_module("kernel_launches").register_words
    dims = (8, 40, 64, 80, 96, 128, 192, 256, 512)
    for heads, dim, value_dim, size in itertools.product(range(1, 17), dims, dims, (2, 4)):
        assert register_words(Shape(1, heads, dim, value_dim, size)) <= 72


@needs_the_simulator
def test_the_committed_results_of_the_kernels_traffic_are_those_of_these_kernels() -> None:
    benchmark = importlib.import_module("kernel_traffic")
    results = json.loads((RESULTS / "kernel-traffic.json").read_text())["results"]
    assert max(row["partial"] for row in results["decode"] if row["heads"] != "64/4") <= 0.02
    assert all(row["read"] + row["partial"] <= 1.1 for row in results["shared"] if row["sequences"] == 4)
    for row in results["decode"]:
        (heads,) = (heads for heads in benchmark.ALL_HEADS if heads.as_columns().items() <= row.items())
        plan = MetalBackend().plan_decode(np.full(row["batch"], row["context"], np.int32), None, heads.shape)
        assert row["distinct"] == 1 and row["register_words"] <= 72
        assert row["threadgroups"] == plan.num_items * heads.num_kv_heads, "run the benchmark again"
    assert benchmark.count_decode(benchmark.LLAMA_8B, 1, 4096) == results["decode"][0], "run the benchmark again"
    assert benchmark.count_prefill(benchmark.LLAMA_8B, 4, 4092) in results["prefill"], "run the benchmark again"
    assert benchmark.count_latent(16, 1, 1, 4096) == results["latent"][0], "run the benchmark again"
    assert benchmark.bounds(quick=False) == results["bounds"]
    assert benchmark.registers(quick=False) == results["registers"]
