"""The benchmarks run, their numbers make sense, and the tables in the docs are those of the committed results."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from comparison.workloads import WORKLOADS
from helpers.run_benchmark import run_benchmark
from metalsim.fixture import Metal

from mlx_paged import paged_attention
from mlx_paged.attention.metal import MetalBackend
from mlx_paged.attention.paged_attention import BACKENDS
from mlx_paged.blocks.allocator import POLICIES

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SOMETIMES = {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "device_name", "architecture"}  # where set, on a GPU


def import_benchmark(name: str) -> Any:
    """The module of a benchmark."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What a quick run prints, and the JSON that it writes."""
    file = tmp_path_factory.mktemp("benchmark") / "memory.json"
    printed = run_benchmark("--quick", "--json", file)
    return printed, json.loads(file.read_text())


def test_parts_that_are_measured_one_by_one_come_together_in_one_file(tmp_path: Path) -> None:
    file = tmp_path / "memory.json"
    for part in ("savings", "waste"):
        run_benchmark("--quick", "--only", part, "--json", file)
    content = json.loads(file.read_text())
    assert list(content["results"]) == ["waste", "savings"]  # in the order of a whole run, whose command this names
    assert content["machine"]["command"] == f"python benchmarks/memory.py --quick --json {file}"
    file.write_text(json.dumps(content | {"machine": content["machine"] | {"cpu_count": 999}}))
    with pytest.raises(subprocess.CalledProcessError) as error:
        run_benchmark("--quick", "--only=savings", "--json", file)
    assert "another cpu_count" in error.value.stderr
    assert json.loads(file.read_text())["results"] == content["results"]


def committed() -> dict[str, Any]:
    return json.loads((RESULTS / "memory-linux-cpu.json").read_text())


def check(content: dict[str, Any]) -> None:
    """Fails unless a file of results is complete and each number is one that could be."""
    machine, results = content["machine"], content["results"]
    assert set(machine) - SOMETIMES == {"platform", "device", "cpu_count", "python", "mlx", "preloaded", "command"}
    assert machine["command"].startswith("python benchmarks/memory.py")
    assert list(results) == ["operations", "waste", "savings", "prefix_cost", "fragmentation"]
    for rows in results.values():
        for row in rows:
            assert row.keys() == rows[0].keys()
            for key, value in row.items():
                if not isinstance(value, str) and key != "share":
                    assert math.isfinite(value) and value >= 0, key
    assert {row["allocator"] for row in results["operations"]} == set(POLICIES)
    for row in results["operations"]:
        assert all(value > 0 for value in row.values() if not isinstance(value, str))

    waste = {row["held_in"]: row["waste"] for row in results["waste"]}
    in_blocks = [waste[f"blocks of {size}"] for size in (8, 16, 32, 64, 128)]
    assert in_blocks == sorted(in_blocks)
    assert waste["blocks of 16"] < 0.04 < waste["2048 tokens reserved"]

    for row in results["savings"]:
        assert all(0 <= row[f"of_{count}"] < 1 for count in (2, 4, 6))
    prefixes = [row["of_6"] for row in results["savings"] if row["sharing"].startswith("prefix")]
    assert prefixes == sorted(prefixes)

    assert [row["phase"] for row in results["prefix_cost"]] == ["prefill", "decode"]
    assert all(-1 < row["share"] < 1 for row in results["prefix_cost"])
    for row in results["fragmentation"]:
        assert row["ratio"] == pytest.approx(row["scattered_ms"] / row["consecutive_ms"])


def test_a_quick_run_writes_what_it_prints(quick: tuple[str, dict[str, Any]]) -> None:
    printed, content = quick
    check(content)
    assert content["machine"]["command"].startswith("python benchmarks/memory.py --quick --json")
    for row in content["results"]["waste"]:
        assert f"{row['held_in']}" in printed and f"{row['waste']:.1%}" in printed


def test_what_is_simulated_is_the_same_in_every_run(quick: tuple[str, dict[str, Any]]) -> None:
    memory = import_benchmark("memory")
    for name in ("waste", "savings"):
        assert getattr(memory, name)(quick=True) == quick[1]["results"][name]


def test_the_committed_results_are_of_a_full_run() -> None:
    content = committed()
    check(content)
    assert "--quick" not in content["machine"]["command"]
    assert max(row["num_blocks"] for row in content["results"]["operations"]) == 10**6
    assert max(row["context"] for row in content["results"]["fragmentation"]) == 16384


def test_the_tables_in_the_docs_are_those_of_the_committed_results() -> None:
    page = (ROOT / "docs" / "memory.md").read_text()
    printed = run_benchmark("--markdown", RESULTS / "memory-linux-cpu.json")
    tables = [part for part in printed.split("\n\n") if part.startswith("|")]
    assert len(tables) == 5
    for table in tables:
        assert table in page
    assert committed()["machine"]["command"] in page


# -- the host's work ---------------------------------------------------------------------------------------------


def check_host_work(content: dict[str, Any]) -> None:
    """Fails unless a file of results is complete and each number is one that could be."""
    machine, results = content["machine"], content["results"]
    keys = {"platform", "device", "cpu_count", "python", "numpy", "mlx", "preloaded", "command"}
    assert set(machine) - SOMETIMES == keys
    assert machine["command"].startswith("python benchmarks/host_overhead.py")
    assert list(results) == ["calibration", "host_work", "detokenising", "graph_building", "end_to_end"]
    for rows in results.values():
        for row in rows:
            assert row.keys() == rows[0].keys()
            assert all(math.isfinite(value) and value >= 0 for value in row.values() if not isinstance(value, str))
    decodes = [row for row in results["host_work"] if row["step"] == "decode"]
    for context in {row["context"] for row in decodes}:
        parts = {row["part"]: row["cpu_median_us"] for row in decodes if row["context"] == context}
        assert list(parts)[5] == "sum of these"
        assert parts["sum of these"] >= max(list(parts.values())[:5])
        assert parts["detokenising"] == 0 or parts["sampling graph"] > parts["detokenising"]
    assert [row["requests"] for row in results["detokenising"]] == ["not streamed"] * 3 + ["streamed"] * 3
    for row in results["graph_building"]:
        assert row["ratio"] == pytest.approx(row["mlx_paged_ms"] / row["mlx_lm_ms"])
    assert [row["pipelining"] for row in results["end_to_end"]] == ["off", "build", "submit"]
    for row in results["end_to_end"]:
        shares = ("own_work", "model_graph", "sampling_graph", "submitting", "waiting", "detokenising")
        assert sum(row[share] for share in shares) == pytest.approx(1)


def test_a_quick_run_of_the_hosts_work_writes_what_it_prints(tmp_path: Path) -> None:
    file = tmp_path / "host.json"
    printed = run_benchmark("--quick", "--json", file, script="host_overhead.py")
    content = json.loads(file.read_text())
    check_host_work(content)
    for row in content["results"]["graph_building"]:
        assert f"{row['mlx_paged_ms']:.2f}" in printed and f"{row['ratio']:.2f}" in printed


def test_the_committed_results_of_the_hosts_work_are_of_a_full_run() -> None:
    content = json.loads((RESULTS / "host-overhead-linux-cpu.json").read_text())
    check_host_work(content)
    assert "--quick" not in content["machine"]["command"]
    sums = {
        row["context"]: row["cpu_median_us"]
        for row in content["results"]["host_work"]
        if (row["step"], row["part"]) == ("decode", "sum of these")
    }
    assert list(sums) == [1000, 10_000, 100_000]
    assert max(sums.values()) <= 2 * min(sums.values())
    assert {row["sequences"] for row in content["results"]["graph_building"]} == {32, 256}


# -- attention ---------------------------------------------------------------------------------------------------


def check_attention(content: dict[str, Any]) -> None:
    """Fails unless a file of results is complete, all results agreed, and rates and shares follow from the times."""
    machine, results = content["machine"], content["results"]
    assert machine["device_info"] and machine["os"] and machine["memory_bytes"] > 0
    assert machine["command"].startswith("python benchmarks/attention.py")
    assert list(results) == ["limits", "decode", "prefill", "block_order", "shared_prefix"]
    limits = {(row["what"], row["dtype"]): row["rate"] for row in results["limits"]}
    assert all(rate > 0 for rate in limits.values())
    copy = limits["copy", "float32"]
    for part in list(results)[1:]:
        for row in results[part]:
            assert row.keys() == results[part][0].keys()
            assert row["agrees"] == "yes" and 0 < row["error"] < 8e-3
            assert row["backend"] in BACKENDS
            assert all(math.isfinite(value) and value > 0 for key, value in row.items() if key.endswith("_us"))
    for row in results["decode"]:
        num_kv_heads, size = int(row["heads"].split("/")[1]), 4 if row["dtype"] == "float32" else 2
        kv_bytes = 2 * row["batch"] * row["context"] * num_kv_heads * row["head_dim"] * size
        q_bytes = row["batch"] * int(row["heads"].split("/")[0]) * row["head_dim"] * size
        assert row["compulsory_bytes"] == kv_bytes + 2 * q_bytes
        assert row["gb_per_s"] == pytest.approx(row["compulsory_bytes"] / row["paged_us"] / 1e3)
        assert row["of_copy"] == pytest.approx(row["gb_per_s"] / copy)
        assert row["contiguous_of_copy"] / row["of_copy"] == pytest.approx(row["paged_us"] / row["contiguous_us"])
    for row in results["prefill"]:
        num_heads = int(row["heads"].split("/")[0])
        pairs = sum(row["prior"] + number + 1 for number in range(row["chunk"]))
        assert row["flops"] == 2 * 2 * num_heads * row["head_dim"] * pairs
        assert row["tflop_per_s"] == pytest.approx(row["flops"] / row["paged_us"] / 1e6)
        assert row["of_matmul"] == pytest.approx(row["tflop_per_s"] / limits["matmul", row["dtype"]])
    for row in results["block_order"]:
        assert row["ratio"] == pytest.approx(row["scattered_us"] / row["consecutive_us"])
    for row in results["shared_prefix"]:
        assert row["speedup"] == pytest.approx(row["separate_us"] / row["shared_us"])
        num_kv_heads, size = int(row["heads"].split("/")[1]), 4 if row["dtype"] == "float32" else 2
        distinct = row["prefix"] + row["batch"] * row["own"]
        q_bytes = row["batch"] * int(row["heads"].split("/")[0]) * row["head_dim"] * size
        assert row["compulsory_bytes"] == 2 * distinct * num_kv_heads * row["head_dim"] * size + 2 * q_bytes


def test_a_quick_run_of_attention_writes_what_it_prints(tmp_path: Path) -> None:
    file = tmp_path / "attention.json"
    printed = run_benchmark("--quick", "--json", file, script="attention.py")
    content = json.loads(file.read_text())
    check_attention(content)
    for row in content["results"]["decode"]:
        assert f"{row['paged_us']:,.0f}" in printed and f"{row['gb_per_s']:,.1f}" in printed
    assert {row["dtype"] for row in content["results"]["decode"]} <= {"float32", "float16", "bfloat16"}


def test_the_committed_results_of_attention_are_of_a_full_run() -> None:
    content = json.loads((RESULTS / "attention-linux-cpu.json").read_text())
    check_attention(content)
    assert "--quick" not in content["machine"]["command"]
    assert content["machine"]["device"] == "Device(cpu, 0)"
    decodes = content["results"]["decode"]
    assert {(row["batch"], row["context"]) for row in decodes} == {(1, 1024), (1, 4096), (8, 1024), (8, 4096)}


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
    benchmark = import_benchmark("attention")
    attend = benchmark.attend
    monkeypatch.setattr(benchmark, "attend", lambda *arguments, **options: wrong(attend(*arguments, **options)))
    heads = benchmark.Heads(6, 2, 32, mx.float32)
    row = benchmark.compare(benchmark.Case(heads, 3, 37), benchmark.with_dense, quick=True)
    assert row["agrees"] == verdict
    assert row["paged_us"] > 0 and row["contiguous_error"] < 2e-5


def test_block_tables_of_a_case_share_the_prefix_and_nothing_else() -> None:
    case = import_benchmark("attention").Case(None, batch=3, context=85, prefix=32)
    consecutive, scattered, shared = case.tables().values()
    assert consecutive.ravel().tolist() == list(range(3 * 6))
    assert sorted(scattered.ravel()) == list(range(3 * 6)) and scattered.tolist() != consecutive.tolist()
    assert (shared[:, :2] == scattered[0, :2]).all() and (shared[:, 2:] == scattered[:, 2:]).all()
    assert case.distinct_tokens() == 32 + 3 * 53


def test_each_call_of_a_chain_takes_the_results_of_the_one_before_and_the_next_layer() -> None:
    benchmark = import_benchmark("attention")
    calls = []

    def call(queries: mx.array, layer: int) -> mx.array:
        calls.append((queries, layer))
        return queries + 1

    assert benchmark.seconds_of_call(benchmark.Contender(mx.zeros(1), call, num_layers=3), num_calls=5) > 0
    assert [(queries.item(), layer) for queries, layer in calls] == [(0, 0), (1, 1), (2, 2), (3, 0), (4, 1)]


@pytest.mark.parametrize("num_queries", [1, 5])
def test_kernels_are_what_is_timed_where_there_is_a_metal_device(num_queries: int, metal: Metal) -> None:
    benchmark = import_benchmark("attention")
    case = benchmark.Case(benchmark.Heads(6, 2, 64, mx.float16), 2, 37, num_queries=num_queries)
    row = benchmark.compare(case, benchmark.with_dense, quick=True)
    assert row["backend"] == "metal" and row["agrees"] == "yes"
    name = "paged_decode" if num_queries == 1 else "paged_prefill"
    assert all(report.kernel.startswith(name) for report in metal.reports[:-1])
    assert len(metal.reports) > 3 * 2  # more than one chain of calls


def test_shapes_that_memory_does_not_hold_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = import_benchmark("attention")
    case = benchmark.Case(benchmark.Heads(32, 8, 128, mx.float16), 4, 1000)
    kv_bytes = 4 * 1000 * 8 * 128 * 2 * 2
    monkeypatch.setattr(benchmark, "device_limit", lambda: (10 * kv_bytes, "RAM"))
    assert case.num_layers() == 1
    monkeypatch.setattr(benchmark, "device_limit", lambda: (6 * kv_bytes, "RAM"))
    assert case.num_layers() == 0
    assert benchmark.compare(case, benchmark.with_dense, quick=True) is None
    assert "left out for want of memory: 32/8 x 128, batch 4, 1 of 1,000 tokens" in capsys.readouterr().err


# -- what the kernels move ---------------------------------------------------------------------------------------


def check_traffic(content: dict[str, Any]) -> None:
    """Fails unless a file of results is complete and each number is within what the kernels promise."""
    machine, results = content["machine"], content["results"]
    assert machine["command"].startswith("python benchmarks/kernel_traffic.py")
    assert list(results) == ["decode", "blocks_and_windows", "shared", "prefill", "bounds"]
    for rows in results.values():
        assert all(row.keys() == rows[0].keys() for row in rows)
    for row in results["decode"] + results["blocks_and_windows"]:
        assert row["distinct"] == 1
        assert 1 <= row["read"] <= 1.01 and 1 <= row["lines"] <= 1.05
        assert row["register_words"] <= 96
    for row in results["decode"] + results["prefill"]:
        assert row["threadgroup_memory"] <= 32 << 10
        num_kv_heads = int(row["heads"].split("/")[1])
        assert row["threadgroups"] % num_kv_heads == 0
    for row in results["prefill"]:
        assert row["distinct"] == 1
        assert 1 <= row["read"] <= row["tiles"]
        assert row["of_tiles"] == pytest.approx(1, abs=0.01)
    for row in results["shared"]:
        assert 1 <= row["read"] < row["separate"] <= row["sequences"]
        assert row["lines"] <= 1.05 * row["read"]
    for row in results["bounds"]:
        kv_bytes = 2 * 32768 * 8 * 128 * 2
        assert row["batch_1_32768"] * 1e-6 * row["bandwidth"] * 1e9 == pytest.approx(kv_bytes)
        assert row["batch_8_4096"] == pytest.approx(row["batch_1_32768"])


needs_the_simulator = pytest.mark.skipif(sys.platform != "linux", reason="the simulator runs on Linux")


@needs_the_simulator
def test_a_quick_run_of_the_kernels_traffic_writes_what_it_prints(tmp_path: Path) -> None:
    file = tmp_path / "traffic.json"
    printed = run_benchmark("--quick", "--json", file, script="kernel_traffic.py")
    content = json.loads(file.read_text())
    check_traffic(content)
    assert "A BOUND, NOT A MEASUREMENT" in printed
    for row in content["results"]["prefill"]:
        assert f"{row['flops_per_byte']:.1f}" in printed and f"{row['threadgroup_memory']:,}" in printed


@needs_the_simulator
def test_one_kv_head_stands_for_all() -> None:
    benchmark = import_benchmark("kernel_traffic")
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
def test_the_committed_results_of_the_kernels_traffic_are_those_of_these_kernels() -> None:
    content = json.loads((RESULTS / "kernel-traffic.json").read_text())
    check_traffic(content)
    assert "--quick" not in content["machine"]["command"]
    benchmark = import_benchmark("kernel_traffic")
    results = content["results"]
    assert max(row["partial"] for row in results["decode"] if row["heads"] != "64/4") <= 0.02
    assert all(row["read"] + row["partial"] <= 1.1 for row in results["shared"] if row["sequences"] == 4)
    for row in results["decode"]:
        (heads,) = (heads for heads in benchmark.ALL_HEADS if heads.as_columns().items() <= row.items())
        plan = MetalBackend().plan_decode(np.full(row["batch"], row["context"], np.int32), None, heads.shape)
        assert row["threadgroups"] == plan.num_items * heads.num_kv_heads, "run the benchmark again"
    assert benchmark.count_decode(benchmark.LLAMA_8B, 1, 4096) == results["decode"][0], "run the benchmark again"
    assert benchmark.count_prefill(benchmark.LLAMA_8B, 4, 4092) in results["prefill"], "run the benchmark again"
    assert benchmark.bounds(quick=False) == results["bounds"]


def test_the_tables_of_the_kernels_page_are_those_of_the_committed_results() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text()
    content = json.loads((RESULTS / "kernel-traffic.json").read_text())
    printed = run_benchmark("--markdown", RESULTS / "kernel-traffic.json", script="kernel_traffic.py")
    tables = [part for part in printed.split("\n\n") if part.startswith("|")]
    assert len(tables) == 5
    for table in tables:
        assert table in page
    assert content["machine"]["command"] in page


# -- concurrency, and pictures -----------------------------------------------------------------------------------

IMAGES = ROOT / "docs" / "images"


@pytest.fixture(scope="module")
def concurrency(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of a quick run."""
    file = tmp_path_factory.mktemp("benchmark") / "concurrency.json"
    printed = run_benchmark("--quick", "--json", file, script="concurrency.py")
    content = json.loads(file.read_text())
    assert list(content["results"]) == ["throughput", "memory_over_time"]
    for row in content["results"]["throughput"]:
        assert f"{row['tokens_per_s']:,.1f}" in printed
    return content["results"]


def test_both_engines_serve_the_same_requests_at_each_concurrency(concurrency: dict[str, Any]) -> None:
    rows = concurrency["throughput"]
    assert [(row["most"], row["system"]) for row in rows] == [
        (most, system) for most in (1, 8) for system in ("mlx-lm", "mlx-paged")
    ]
    assert len({row["output_tokens"] for row in rows}) == 2
    for mlx_lm, ours in zip(rows[::2], rows[1::2], strict=True):
        assert mlx_lm["output_tokens"] == ours["output_tokens"]
    for row in rows:
        assert row["requests"] == 2 * row["most"]
        assert row["tokens_per_s"] > 0 and row["kv_peak_mb"] > 0 and 0 <= row["kv_waste"] < 1
        if row["system"] == "mlx-paged":
            assert row["at_once"] == row["most"]


def test_memory_over_time_is_what_the_sequences_take_step_by_step(concurrency: dict[str, Any]) -> None:
    rows = concurrency["memory_over_time"]
    (case,) = WORKLOADS["W3"].cases(32)
    prompts = [length.prompt for length in case.lengths]
    first = rows[0]
    assert (first["step"], first["used"]) == (1, sum(prompts[: first["requests"]]))
    assert first["blocks"] == sum(-(-prompt // 16) * 16 for prompt in prompts[: first["requests"]])
    assert rows[-1]["step"] - first["step"] >= len(rows) - 1 > max(length.output for length in case.lengths)
    for row in rows:
        assert row["used"] <= row["blocks"] <= row["pool"] == 4 * 64
        assert row["blocks"] - row["used"] < 16 * row["requests"]
        assert (row["padded"], row["reserved"]) == (256 * row["requests"], 64 * row["requests"])  # none is longer


def points(svg: Path, line: str) -> np.ndarray:
    """The corners of a line in a picture, [n, 2], each axis from 0 to 1."""
    groups = [element for element in ElementTree.parse(svg).iter() if element.get("id") == f"line-{line}"]
    path = next(groups[0].iter("{http://www.w3.org/2000/svg}path")).get("d", "")
    corners = np.array([pair.split() for pair in re.findall(r"[ML] (\S+ \S+)", path)], float)
    corners[:, 1] *= -1  # down is positive
    return (corners - corners.min(axis=0)) / np.ptp(corners, axis=0)


def words(svg: Path) -> list[str]:
    return [text for element in ElementTree.parse(svg).iter() if (text := (element.text or "").strip())]


MACHINE = {"platform": "Darwin arm64", "device": "Device(gpu, 0)", "cpu_count": 11, "mlx": "0.99.1"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of results that were made up."""
    results, images = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("images")
    shares = {"64 tokens reserved": 0.8125, "mlx-lm": 0.5, "mlx-paged": 0.0371}
    waste = [{"system": system, "kv_waste": share} for system, share in shares.items()]
    speeds = {"mlx-lm": [10, 19, 30], "mlx-paged": [9, 20, 41]}
    throughput = [
        {"most": most, "system": system, "tokens_per_s": speed}
        for system, of_system in speeds.items()
        for most, speed in zip((1, 4, 16), of_system, strict=True)
    ]
    taken = {"pool": 8192, "padded": 768, "requests": 3, "reserved": 3 * 2048}
    memory = [taken | {"step": i, "used": 50 + i * i, "blocks": 70 + i * i} for i in range(1, 14)]
    concurrency = {"throughput": throughput, "memory_over_time": memory}
    for name, content in {"workloads": {"W2": [], "W3": waste}, "concurrency": concurrency}.items():
        (results / f"{name}-m9.json").write_text(json.dumps({"machine": MACHINE, "results": content}))
    run_benchmark(results, images, script="plots.py")
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    run_benchmark(results, images, script="plots.py")
    assert before == {path.name: path.read_bytes() for path in images.iterdir()}, "not the same bytes each time"
    return images


def test_pictures_name_the_machine_and_stay_small(pictures: Path) -> None:
    names = {"waste-m9.svg", "throughput-m9.svg", "memory-over-time-m9.svg"}
    assert {path.name for path in pictures.iterdir()} == names
    for path in pictures.iterdir():
        assert "Darwin arm64, 11 cores, MLX 0.99.1 on the GPU" in words(path), "text has to be text"
        assert path.stat().st_size < 60_000


def test_a_picture_of_waste_says_each_share(pictures: Path) -> None:
    told = words(pictures / "waste-m9.svg")
    assert {"64 tokens reserved", "mlx-lm", "mlx-paged", "81.2%", "50.0%", "3.7%"} <= set(told)
    assert [word for word in told if word.endswith((".7%", ".0%"))] == ["3.7%", "50.0%"]  # from below


def test_lines_of_pictures_go_through_the_numbers(pictures: Path) -> None:
    assert points(pictures / "throughput-m9.svg", "mlx-paged") == pytest.approx(
        np.array([[0, 0], [0.5, 11 / 32], [1, 1]]), abs=1e-4
    )
    steps = np.arange(1, 14)
    expected = np.stack([(steps - 1) / 12, (steps**2 - 1) / 168], axis=1)
    assert points(pictures / "memory-over-time-m9.svg", "blocks") == pytest.approx(expected, abs=1e-4)
    assert {"2,048 tokens reserved for each", "the pool: 8,192"} <= set(words(pictures / "memory-over-time-m9.svg"))


def test_the_committed_pictures_are_those_of_the_committed_results(tmp_path: Path) -> None:
    run_benchmark(RESULTS, tmp_path, script="plots.py")
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in IMAGES.glob("*-*.svg")), "python benchmarks/plots.py draws them"
    lines = {"throughput": ("mlx-lm", "mlx-paged"), "memory-over-time": ("reserved", "padded", "blocks")}
    for name in drawn:  # not their bytes, which depend on the version of matplotlib
        assert words(tmp_path / name) == words(IMAGES / name)
        for line in next((lines[kind] for kind in lines if name.startswith(kind)), ()):
            assert points(tmp_path / name, line) == pytest.approx(points(IMAGES / name, line), abs=1e-3)


def test_the_tables_of_the_benchmarks_page_are_those_of_the_committed_results() -> None:
    results = RESULTS / "workloads-linux-cpu.json"
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    tables = page.split(f"<!-- tables of benchmarks/results/{results.name} -->\n")[1].split("<!-- end -->")[0]
    assert tables.strip() == run_benchmark("--markdown", results, script="workloads.py").strip()
    rows = [row for part in json.loads(results.read_text())["results"].values() for row in part]
    assert all(row["tokens_per_s"] > 0 and row["requests"] * row["output_tokens"] > 0 for row in rows)


def table_against_mlx_lm(results: dict[str, Any]) -> str:
    """Of the README: of each case the engine's best way to serve it, against mlx-lm's."""
    lines = [
        "| | mlx-lm, tokens/s | mlx-paged | | mlx-lm, MB of K and V | mlx-paged |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, rows in results.items():
        for case in dict.fromkeys(row["case"] for row in rows):
            own = [row for row in rows if row["case"] == case]
            if not (own[0]["system"].startswith("mlx-lm") and own[-1]["system"].startswith("mlx-paged")):
                continue
            ours = own[-1]
            for other in own:
                if other is own[0] or other["system"] == "mlx-lm, prompt cache":
                    also = "" if other is own[0] else ", and its prompt cache"
                    label = f"{name}, {WORKLOADS[name].about}: {case}{also}"
                    ratio = ours["speedup"] / other["speedup"]
                    speeds = f"{other['tokens_per_s']:,.1f} | {ours['tokens_per_s']:,.1f} | {ratio:.2f}x"
                    memory = f"{other['kv_peak_mb']:,.0f} | {ours['kv_peak_mb']:,.0f}"
                    lines.append(f"| {label} | {speeds} | {memory} |")
    return "\n".join(lines)


def test_the_table_of_the_readme_is_that_of_the_committed_results() -> None:
    name = "workloads-linux-cpu.json"
    results = json.loads((RESULTS / name).read_text())["results"]
    page = (ROOT / "README.md").read_text()
    table = page.split(f"<!-- table of benchmarks/results/{name} -->\n")[1].split("<!-- end -->")[0]
    assert table.strip() == table_against_mlx_lm(results)


def test_the_table_of_throughput_is_that_of_the_committed_results() -> None:
    file = RESULTS / "concurrency-linux-cpu.json"
    table = run_benchmark("--markdown", file, script="concurrency.py").split("\n\n")[1]
    assert table.strip() in (ROOT / "docs" / "benchmarks.md").read_text()


SCRIPT = """
import os, report
from report import Part

def first(quick): return [{"n": 1, "process": os.getpid()}]
def broken(quick): raise ValueError("no such luck")
def last(quick): return [{"n": 3, "process": os.getpid()}]

parts = [Part(run, run.__name__, {"n": ("number", "")}) for run in (first, broken, last)]
if __name__ == "__main__":
    report.main("script.py", "What it is for.", parts, apart=APART)
"""


@pytest.mark.parametrize("apart", [False, True])
def test_a_part_that_fails_keeps_no_other_from_being_measured(apart: bool, tmp_path: Path) -> None:
    script, file = tmp_path / "script.py", tmp_path / "out.json"
    script.write_text(SCRIPT.replace("APART", str(apart)))
    file.write_text(json.dumps({"machine": {"platform": "another"}, "results": {"old": []}}))
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(script), "--json", str(file)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no such luck" in done.stderr and done.stderr.endswith("script.py: broken failed; why is said above\n")
    content = json.loads(file.read_text())
    assert {name: rows[0]["n"] for name, rows in content["results"].items()} == {"first": 1, "last": 3}
    assert (len({rows[0]["process"] for rows in content["results"].values()}) == 2) == apart
    assert content["machine"]["command"].endswith(f"script.py --json {file}")
