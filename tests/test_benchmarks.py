"""The benchmarks run, their numbers make sense, and the tables in the docs are those of the committed results."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_paged.allocator import POLICIES

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def run_benchmark(*arguments: str | Path, script: str = "memory.py") -> str:
    """What a benchmark prints."""
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *arguments],
        env=os.environ | {"PYTHONPATH": python_path, "COLUMNS": "160"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What a quick run prints, and the JSON that it writes."""
    file = tmp_path_factory.mktemp("benchmark") / "memory.json"
    printed = run_benchmark("--quick", "--json", file)
    return printed, json.loads(file.read_text())


def committed() -> dict[str, Any]:
    return json.loads((RESULTS / "memory-linux-cpu.json").read_text())


def check(content: dict[str, Any]) -> None:
    """Fails unless a file of results is complete and each number is one that could be."""
    machine, results = content["machine"], content["results"]
    assert set(machine) == {"platform", "device", "cpu_count", "python", "mlx", "preloaded", "command"}
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
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import memory
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
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
    assert set(machine) == {"platform", "device", "cpu_count", "python", "numpy", "mlx", "preloaded", "command"}
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
