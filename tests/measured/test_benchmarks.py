"""The benchmarks run, and their numbers make sense; test_results_page.py holds the committed tables to them."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers.budget import LONG
from helpers.run_benchmark import RESULTS, ROOT, check_machine, run_benchmark

from mlx_paged.attention.paged_attention import BACKENDS
from mlx_paged.blocks.free_lists import POLICIES

QuickRun = Callable[[str], tuple[str, dict[str, Any]]]

# -- what results have to be ---------------------------------------------------------------------------------------


def check_memory(content: dict[str, Any]) -> None:
    """Fails unless a file of results is complete and each number is one that could be."""
    check_machine(content, "memory.py")
    results = content["results"]
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


def check_host_work(content: dict[str, Any]) -> None:
    """Fails unless a file of results is complete and each number is one that could be."""
    check_machine(content, "host_overhead.py", "numpy")
    results = content["results"]
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


def check_attention(content: dict[str, Any]) -> None:
    """Fails unless a file of results is complete, all results agreed, and rates and shares follow from the times."""
    machine, results = content["machine"], content["results"]
    assert machine["device_info"] and machine["os"] and machine["memory_bytes"] > 0
    assert machine["command"].startswith("python benchmarks/attention.py")
    assert {"limits", "decode", "prefill", "block_order"} <= set(results)
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
    for row in results.get("few_queries", ()):
        (one,) = (other for other in results["few_queries"] if other["heads"] == row["heads"] and other["queries"] == 1)
        assert row["ratio"] == pytest.approx(row["paged_us"] / one["paged_us"])
    for row in results.get("shared_prefix", ()):
        assert row["speedup"] == pytest.approx(row["each_us"] / row["once_us"])
        num_kv_heads, size = int(row["heads"].split("/")[1]), 4 if row["dtype"] == "float32" else 2
        distinct = row["prefix"] + row["batch"] * row["own"]
        q_bytes = row["batch"] * int(row["heads"].split("/")[0]) * row["head_dim"] * size
        assert row["compulsory_bytes"] == 2 * distinct * num_kv_heads * row["head_dim"] * size + 2 * q_bytes


def check_traffic(content: dict[str, Any]) -> None:
    """Fails unless a file of results is complete and each number is within what the kernels promise."""
    machine, results = content["machine"], content["results"]
    assert machine["command"].startswith("python benchmarks/kernel_traffic.py")
    kinds_of_decode = ["decode", "registers", "quantised", "blocks_and_windows", "shared"]
    assert list(results) == [*kinds_of_decode, "prefill", "latent", "bounds"]
    for rows in results.values():
        assert all(row.keys() == rows[0].keys() for row in rows)
    for row in results["decode"] + results["blocks_and_windows"]:
        assert row["distinct"] == 1
        num_heads, num_kv_heads = map(int, row["heads"].split("/"))
        readers = -(-num_heads // num_kv_heads * row["head_dim"] // 512)  # simdgroups that ask for a key
        again = 31 / row.get("visible", row["context"])  # of a sequence's last key, at the end of a tile
        assert readers <= row["read"] <= readers * (1.01 + again)
        assert readers <= row["lines"] <= readers * (1.05 + again)
        assert row["register_words"] <= 72
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
    for row in results["latent"]:
        assert row["distinct"] == 1
        assert 1 <= row["read"] <= -(-row["heads"] * row["queries"] // 16) and row["partial"] < 0.25
    for row in results["bounds"]:
        kv_bytes = 2 * 32768 * 8 * 128 * 2
        assert row["batch_1_32768"] * 1e-6 * row["bandwidth"] * 1e9 == pytest.approx(kv_bytes)
        assert row["batch_8_4096"] == pytest.approx(row["batch_1_32768"])


def check_command_buffers(content: dict[str, Any]) -> None:
    """Fails unless each way takes fewer command buffers than the one before it."""
    (rows,) = content["results"].values()
    for row in rows:
        assert row["scatter"] > row["kernel, whole pools"] > row["kernel, one block"] >= row["operations"] // 51
        assert row["operations"] == row["operations of a scatter"] - row["layers"], "one kernel for two scatters"


def check_server(content: dict[str, Any]) -> None:
    """Fails unless a file of results is complete and each number is one that could be."""
    check_machine(content, "server.py", "mlx_lm", "model", "load_at_start")
    (rows,) = content["results"].values()
    systems = ["AsyncLLM", "mlx-paged serve", "mlx_lm.server"]
    systems += ["llama.cpp's server"] * ("--llama-server" in content["machine"]["command"])
    assert [row["system"] for row in rows] == systems * len({row["streams"] for row in rows})
    for row in rows:
        assert row.keys() == rows[0].keys()
        assert all(math.isfinite(value) and value > 0 for value in row.values() if not isinstance(value, str))
        assert row["system"] != "AsyncLLM" or row["of_async_llm"] == 1
        assert row["first_ms_p50"] <= row["first_ms_p95"] and row["tokens"] >= row["streams"]


# -- each benchmark ------------------------------------------------------------------------------------------------


class Benchmark(NamedTuple):
    """A script, and the file of its committed results."""

    script: str
    results: str
    check: Callable[[dict[str, Any]], None]


BENCHMARKS = [
    Benchmark("memory.py", "memory-linux-cpu.json", check_memory),
    Benchmark("host_overhead.py", "host-overhead-linux-cpu.json", check_host_work),
    Benchmark("attention.py", "attention-linux-cpu.json", check_attention),
    Benchmark("server.py", "server-scripted-linux-cpu.json", check_server),
    Benchmark("server.py", "server-smollm2-linux-cpu.json", check_server),
    Benchmark("kernel_traffic.py", "kernel-traffic.json", check_traffic),
    Benchmark("command_buffers.py", "command-buffers.json", check_command_buffers),
]


def committed(file: str) -> dict[str, Any]:
    return json.loads((RESULTS / file).read_text())


def tables_of(script: str, file: Path) -> list[str]:
    printed = run_benchmark("--markdown", file, script=script)
    return [part.strip() for part in printed.split("\n\n") if part.startswith("|")]


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> QuickRun:
    """What a quick run of a script prints, and the JSON that it writes; each script runs once."""
    runs: dict[str, tuple[str, dict[str, Any]]] = {}

    def run(script: str) -> tuple[str, dict[str, Any]]:
        if script not in runs:
            file = tmp_path_factory.mktemp("benchmark") / "results.json"
            printed = run_benchmark("--quick", "--json", file, script=script)
            runs[script] = printed, json.loads(file.read_text())
        return runs[script]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("measured", BENCHMARKS, ids=lambda measured: measured.results)
def test_a_quick_run_writes_what_it_prints_in_the_form_of_the_committed_results(
    measured: Benchmark, quick_run: QuickRun, tmp_path: Path
) -> None:
    if measured.script == "server.py" and not LONG:
        pytest.skip("takes long: MLX_PAGED_LONG_TESTS=1 runs it")
    if measured.script == "kernel_traffic.py" and sys.platform != "linux":
        pytest.skip("the simulator runs on Linux")
    printed, content = quick_run(measured.script)
    measured.check(content)
    assert content["machine"]["command"].startswith(f"python benchmarks/{measured.script} --quick --json")
    for part, rows in committed(measured.results)["results"].items():
        assert content["results"][part][0].keys() == rows[0].keys()
    (tmp_path / "results.json").write_text(json.dumps(content))
    for table in tables_of(measured.script, tmp_path / "results.json"):
        for cell in filter(None, (cell.strip() for line in table.split("\n") for cell in line.split("|"))):
            assert cell in printed or set(cell) <= set("-:")


@pytest.mark.parametrize("measured", BENCHMARKS, ids=lambda measured: measured.results)
def test_the_committed_results_are_of_a_full_run(measured: Benchmark) -> None:
    content = committed(measured.results)
    measured.check(content)
    assert "--quick" not in content["machine"]["command"]


def test_full_runs_reach_the_sizes_that_are_claimed() -> None:
    memory = committed("memory-linux-cpu.json")["results"]
    assert max(row["num_blocks"] for row in memory["operations"]) == 10**6
    assert max(row["context"] for row in memory["fragmentation"]) == 16384
    host = committed("host-overhead-linux-cpu.json")["results"]
    sums = {
        row["context"]: row["cpu_median_us"]
        for row in host["host_work"]
        if (row["step"], row["part"]) == ("decode", "sum of these")
    }
    assert list(sums) == [1000, 10_000, 100_000]
    assert max(sums.values()) <= 2 * min(sums.values())
    assert {row["sequences"] for row in host["graph_building"]} == {32, 256}
    attention = committed("attention-linux-cpu.json")
    assert attention["machine"]["device"] == "Device(cpu, 0)"
    decodes = attention["results"]["decode"]
    assert {(row["batch"], row["context"]) for row in decodes} == {(1, 1024), (1, 4096), (8, 1024), (8, 4096)}


@pytest.mark.slow
def test_what_is_simulated_is_the_same_in_every_run(quick_run: QuickRun) -> None:
    memory = importlib.import_module("memory")
    for name in ("waste", "savings"):
        assert getattr(memory, name)(quick=True) == quick_run("memory.py")[1]["results"][name]


@pytest.mark.skipif(not LONG, reason="takes long: MLX_PAGED_LONG_TESTS=1 runs it")
@pytest.mark.slow
def test_a_soak_asks_for_all_and_looks_at_memory() -> None:
    printed = run_benchmark("--soak", "0.1", script="server.py")
    kinds = dict(re.findall(r"([\d,]+) (bad|left|stream|whole)\b", printed.split("requests")[-1]))
    assert len(kinds) > 1 and "0 answers were wrong" in printed and "0% of the blocks are held at the end" in printed


def test_memory_that_goes_on_growing_after_the_warm_up_is_seen() -> None:
    growth = importlib.import_module("soak").growth
    assert growth([10, 50, 99, 100, 101, 100, 99, 100, 101, 100]) <= 1
    assert growth([100 + 10 * look for look in range(20)]) == 100


# -- the command line of all ---------------------------------------------------------------------------------------


@pytest.mark.slow
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


@pytest.mark.parametrize("text", ['{"machine": ', "[]", '{"results": {}}'])
def test_parts_are_not_added_to_what_is_no_file_of_results(text: str, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    file.write_text(text)
    with pytest.raises(SystemExit, match=r"out\.json is no file of results: give another file, or measure all parts$"):
        importlib.import_module("report")._content_to_keep(file, {})
    assert file.read_text() == text


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
    script, file = tmp_path / "script.py", tmp_path / "out 1.json"
    script.write_text(SCRIPT.replace("APART", str(apart)))
    file.write_text(json.dumps({"machine": {"platform": "another"}, "results": {"old": []}}))
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(script), "--json", str(file)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no such luck" in (done.stdout if apart else done.stderr)
    assert done.stderr.endswith(f"script.py: broken failed; why is said above{' and in the file' * apart}\n")
    content = json.loads(file.read_text())
    assert {name: rows[0]["n"] for name, rows in content["results"].items()} == {"first": 1, "last": 3}
    assert (len({rows[0]["process"] for rows in content["results"].values()}) == 2) == apart
    assert content["machine"]["command"].endswith(f"script.py --json '{file}'")
