"""How the benchmarks of attention and of kernels measure: what is timed, what is compared, what is left out."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.run_benchmark import RESULTS
from metalsim.fixture import Metal

from mlx_paged import kernels, paged_attention
from mlx_paged.attention import work_items as work_items
from mlx_paged.attention.metal import MetalBackend
from mlx_paged.attention.paged_attention import BACKENDS
from mlx_paged.attention.work_items import Shape, decode_layout
from mlx_paged.cache.codes import choose_codes
from mlx_paged.cache.layer_spec import LayerSpec
from mlx_paged.sampling import draw_kernel

ROOT = Path(__file__).parents[2]
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


def test_layouts_of_decode_that_are_swept_are_those_they_say_and_right(
    metal: Metal, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark, layers = (importlib.import_module(name) for name in ("decode_layouts", "attention_layers"))
    assert benchmark.CHOSEN in benchmark.LAYOUTS.values()
    monkeypatch.setattr(benchmark, "LAYOUTS", {"a": (8, 4), "b": (16, 8)})
    made = layers.Layers(layers.Case(layers.Heads(2, 1, 256, mx.bfloat16), 1, 33), 1, quick=True)
    chosen = decode_layout(Shape(1, 2, 256, 256, 2))
    contenders = benchmark.with_layouts(made)
    assert all(made.error(contender, table) < 8e-3 for contender, table in contenders.values())
    traffic = [report.traffic for report in metal.reports[2:] if report.traffic]
    assert [each.threads // each.threadgroups for each in traffic] == [32 * 4, 32 * 8]
    asked = [each.buffers["v_cache"].bytes_read for each in traffic]
    assert asked[0] == 2 * asked[1]  # by two neighbours
    assert decode_layout(Shape(1, 2, 256, 256, 2)) == chosen
    assert (work_items.ELEMENTS_PER_LANE, work_items.SIMDGROUPS) == benchmark.CHOSEN


def test_the_threads_that_metal_allows_are_learnt_from_launches_that_fail(
    metal: Metal, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = importlib.import_module("decode_layouts")
    make, made = kernels.make_kernel, []

    def make_kernel(*arguments: Any) -> Callable[..., list[mx.array]]:
        made.append(make(*arguments))

        def call(**settings: Any) -> list[mx.array]:
            if settings["threadgroup"][0] < 2048:
                return made[-1](**settings)
            raise ValueError(
                "Thread group size (2048) is greater than  the maximum allowed threads per threadgroup (448)"
            )

        return call

    monkeypatch.setattr(kernels, "make_kernel", make_kernel)
    monkeypatch.setattr(draw_kernel, "make_kernel", make_kernel)
    rows = {row["kernel"]: row for row in benchmark.threads(quick=True)}
    assert set(rows) == {
        "paged_decode, 8x4",
        "paged_write",
        "paged_prefill",
        "paged_merge",
        "paged_latent",
        "draw_tokens",
    }
    assert {row["most"] for row in rows.values()} == {448}
    assert rows["paged_decode, 8x4"]["given"] == 32 * 4 and rows["draw_tokens"]["given"] == draw_kernel.THREADS
    assert not any(kernel.startswith("paged_") and not row["given"] for kernel, row in rows.items())


def test_where_there_is_no_kernel_no_threads_are_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_PAGED_BACKEND", "reference")
    rows = list(importlib.import_module("decode_layouts").threads(quick=True))
    assert {row["given"] for row in rows if row["kernel"] != "draw_tokens"} == {0}


def test_windows_follow_a_warm_up_and_their_median_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark, clock, asked = importlib.import_module("attention_layers"), [0.0], []

    def seconds_of_call(contender: Any, num_calls: int) -> float:
        """Twice as long while clocks rise, and in the second window."""
        slow = clock[0] < 0.9 or 1.4 < clock[0] < 1.8
        clock[0] += num_calls * 1e-3 * (2 if slow else 1)
        asked.append(num_calls)
        return 1e-3 * (2 if slow else 1)

    monkeypatch.setattr(benchmark, "seconds_of_call", seconds_of_call)
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])
    found = benchmark.measure({"it": None}, quick=False)
    assert found["it"] == pytest.approx(1e-3) and 0 < found["spread"] <= 1
    assert asked[-1] == 20, "calls that take 20 ms"
    assert clock[0] >= benchmark.WARM_SECONDS + benchmark.NUM_WINDOWS * benchmark.WINDOW_SECONDS


def test_a_prefix_is_read_once_by_one_of_the_contenders(metal: Metal) -> None:
    layers = importlib.import_module("attention_layers")
    case = layers.Case(layers.Heads(4, 1, 64, mx.float16), 4, 205, prefix=192)
    made = layers.Layers(case, 1, quick=True)
    read = {}
    for name, (contender, _) in layers.with_prefix(made).items():
        if name != "contiguous":
            before = len(metal.reports)
            mx.eval(contender.call(contender.queries, 0))
            launches = [report for report in metal.reports[before:] if "paged_merge" not in report.kernel]
            read[name] = sum(report.traffic.buffers["k_cache"].bytes_read for report in launches)
    assert read["once"] < read["each"] / 2 and read["each"] == read["separate"]


@pytest.mark.parametrize("num_queries", [1, 7])  # of 3 heads each: more rows than decode takes
def test_kernels_are_what_is_timed_where_there_is_a_metal_device(num_queries: int, metal: Metal) -> None:
    benchmark = importlib.import_module("attention_layers")
    case = benchmark.Case(benchmark.Heads(6, 2, 64, mx.float16), 2, 37, num_queries=num_queries)
    row = benchmark.compare(case, benchmark.with_dense, quick=True)
    assert row["backend"] == "metal" and row["agrees"] == "yes"
    name = "paged_decode" if num_queries == 1 else "paged_prefill"
    assert all(report.kernel.startswith(name) for report in metal.reports)
    assert len(metal.reports) == 4  # one to compare, one to warm up, and two windows


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


def test_a_command_buffer_ends_by_its_operations_or_by_the_elements_of_its_distinct_arrays() -> None:
    benchmark = importlib.import_module("command_buffers")
    operation, block = benchmark.Operation, 1000

    def count(operations: list[Any], sizes: dict[str, int]) -> int:
        return int(benchmark.count_buffers(operations, sizes, 40, block)["buffers"])

    assert count([operation("Add", ["a"], ["b"])] * 40, {}) == 1
    assert count([operation("Add", ["a"], ["b"])] * 41, {}) == 2
    sizes = {"weight": 30 << 20, "pool": 60 << 20}
    matmuls = [operation("Matmul", ["weight", "a"], ["b"])]
    assert count(matmuls * 2, sizes) == 1 and count(matmuls, {"weight": 41 << 20}) == 2
    view = operation("Slice", ["pool"], ["view"])
    reads = [operation("Depends", [taken, "weight"], ["out"]) for taken in ("pool", "view")]
    assert count([view, reads[0]], sizes) == 2 and count([view, reads[1]], sizes) == 1
    scatters = [operation("Scatter", ["pool", "rows"], ["written"]), operation("Depends", ["written"], ["out"])]
    assert count(scatters, sizes) == 3, "the pool counts in each buffer, by its place in memory"


def test_the_page_on_kernels_has_the_command_buffers_that_were_counted() -> None:
    page = " ".join((RESULTS.parents[1] / "docs" / "kernels.md").read_text().split())
    rows = {
        row["model"]: row
        for row in json.loads((RESULTS / "command-buffers.json").read_text())["results"]["steps"]
        if row["bits"] == 4 and row["chip"] == "Max, Ultra"
    }
    small, llama, experts = (rows[name] for name in ("Qwen3-4B", "Llama-3.1-8B", "Qwen3-30B-A3B"))
    views, whole, scatter = "kernel, one block", "kernel, whole pools", "scatter"
    assert f"takes {small[views]} command buffers" in page
    assert f"it would take {small[whole]} with whole pools and {small[scatter]} with scatter" in page
    assert f"Llama 3.1 8B {llama[views]} instead of {llama[whole]} and {llama[scatter]}" in page
    assert f"Qwen3-30B-A3B in 4 bits goes from {experts[scatter]} to {experts[views]}" in page


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
def test_a_thread_of_decode_keeps_what_the_page_says_whatever_the_shape() -> None:
    register_words = importlib.import_module("kernel_launches").register_words
    dims = (8, 40, 64, 80, 96, 128, 192, 256, 512)
    points = itertools.product(range(1, 17), dims, dims, (2, 4))
    most = max(register_words(Shape(1, *point)) for point in points)
    page = " ".join((ROOT / "docs" / "kernels.md").read_text().split())
    assert f"A thread keeps at most {most} words." in page
    for heads in (6, 8):
        assert register_words(Shape(1, heads, 256, 256, 2)) == 48
    assert (
        "a thread keeps 48 words where one simdgroup with all six heads had 90, and with 8 heads of 256 the same"
        in page
    )


@needs_the_simulator
def test_what_the_page_says_of_codes_is_so() -> None:
    register_words = importlib.import_module("kernel_launches").register_words
    page = " ".join((ROOT / "docs" / "kernels.md").read_text().split())
    of_token = {name: LayerSpec(1, 128, 128, mx.float16).quantised(name).bytes_per_token for name in ("int8", "k8v4")}
    assert "takes {int8} bytes of a head in `int8` and {k8v4} in `k8v4`".format(**of_token) in page
    shapes = LayerSpec(1, 128, 128, mx.float16).quantised("int8").shapes(1, 16)
    sizes = [math.prod(shape) * dtype.size for shape, dtype in (shapes["k_codes"], shapes["k_params"])]
    assert page.count(f"{sizes[0]:,} bytes of a head") == page.count(f"{sizes[1]} bytes of a head") == 1
    plain = Shape(1, 4, 128, 128, 2)
    words = [register_words(plain._replace(codes=choose_codes(name, 128, 128))) for name in ("int8", "k8v4", "fp8")]
    assert f"keeps {max(words)} words where it keeps {register_words(plain)} over float16" in page
    dims, names = (32, 64, 96, 128, 192, 256), ("int8", "k8v4", "fp8")
    points = itertools.product(names, range(1, 17), dims, dims, (2, 4))
    most = max(
        register_words(Shape(1, heads, dim, value_dim, size, codes=choose_codes(name, dim, value_dim)))
        for name, heads, dim, value_dim, size in points
    )
    assert f"it has at most {most}, of float32" in page
    rows = json.loads((RESULTS / "kernel-traffic.json").read_text())["results"]["quantised"]
    for row in rows:
        if row["head_dim"] == 128 and row["kv_cache_dtype"] != "fp8":
            share = {"int8": "0.531", "k8v4": "0.422"}[row["kv_cache_dtype"]]
            assert [f"{row[name]:.3f}" for name in ("distinct", "read", "lines")] == [share] * 3
    assert "are 0.531 of float16's with `int8` and 0.422 with `k8v4`" in page
    assert max(row["partial"] for row in rows) <= 0.04 * 0.422


@needs_the_simulator
def test_the_committed_results_of_the_kernels_traffic_are_those_of_these_kernels() -> None:
    benchmark = importlib.import_module("kernel_traffic")
    results = json.loads((RESULTS / "kernel-traffic.json").read_text())["results"]
    assert max(row["partial"] for row in results["decode"] if row["heads"] != "64/4") <= 0.02
    assert all(row["read"] + row["partial"] <= 1.1 for row in results["shared"] if row["sequences"] == 4)
    for row in results["decode"]:
        (heads,) = (heads for heads in benchmark.ALL_HEADS if heads.as_columns().items() <= row.items())
        plan = MetalBackend().plan_decode(
            np.full(row["batch"], row["context"]), np.arange(row["batch"] + 1), None, heads.shape
        )
        assert row["distinct"] == 1 and row["register_words"] <= 72
        assert row["threadgroups"] == plan.num_items * heads.num_kv_heads, "run the benchmark again"
    assert benchmark.count_decode(benchmark.LLAMA_8B, 1, 4096) == results["decode"][0], "run the benchmark again"
    assert benchmark.count_prefill(benchmark.LLAMA_8B, 4, 4092) in results["prefill"], "run the benchmark again"
    assert benchmark.count_latent(16, 1, 1, 4096) == results["latent"][0], "run the benchmark again"
    made = {"kv_cache_dtype": "k8v4"} | benchmark.count_decode(benchmark.LLAMA_8B, 1, 4096, kv_cache_dtype="k8v4")
    assert made in results["quantised"], "run the benchmark again"
    assert benchmark.bounds(quick=False) == results["bounds"]
    assert benchmark.registers(quick=False) == results["registers"]
