"""This engine beside mlx-lm: runs count what the workloads say, and the committed tables are those of the pages."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from comparison.workloads import WORKLOADS
from helpers.budget import LONG
from helpers.run_benchmark import ROOT, check_machine, run_benchmark

TEXT = {"workload", "case", "system"}


def check_comparison(results: dict[str, list[dict[str, Any]]]) -> None:
    """Fails unless the rows are complete and each number is one that could be."""
    for name, rows in results.items():
        for row in rows:
            assert row["workload"] == name
            assert row.keys() == rows[0].keys()
            assert all(math.isfinite(row[key]) and row[key] >= 0 for key in row.keys() - TEXT), row
            assert row["tokens_per_s"] > 0 and 0 < row["peak_concurrency"] <= row["requests"]
            assert row["first_token_p50_ms"] <= row["first_token_p95_ms"]
            assert row["per_token_p50_ms"] <= row["per_token_p95_ms"]
            assert row["kv_peak_mb"] > 0 and row["kv_waste"] < 1
        for case in {row["case"] for row in rows}:
            first, *others = [row for row in rows if row["case"] == case]
            assert first["speedup"] == first["cpu_speedup"] == 1
            for row in others:
                assert row["output_tokens"] == first["output_tokens"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What a quick run of the script prints, and the JSON that it writes."""
    file = tmp_path_factory.mktemp("benchmark") / "workloads.json"
    printed = run_benchmark("--quick", "--json", file, script="workloads.py")
    return printed, json.loads(file.read_text())


@pytest.mark.slow
def test_a_quick_run_of_all_workloads_writes_what_it_prints(quick: tuple[str, dict[str, Any]]) -> None:
    printed, content = quick
    check_machine(content, "workloads.py", "mlx_lm")
    assert content["machine"]["command"].startswith("python benchmarks/workloads.py --quick --json")
    assert list(content["results"]) == list(WORKLOADS)
    check_comparison(content["results"])
    for name, workload in WORKLOADS.items():
        assert f"{name}, {workload.about}" in printed


def rows_of(content: dict[str, Any], name: str, case: str = "") -> dict[str, dict[str, Any]]:
    return {row["system"]: row for row in content["results"][name] if case in row["case"]}


@pytest.mark.slow
def test_what_is_counted_is_what_the_workload_says(quick: tuple[str, dict[str, Any]]) -> None:
    _, content = quick
    for name in ("W1", "W2"):
        rows = rows_of(content, name)
        assert rows["mlx-paged"]["peak_concurrency"] == 16 <= rows["mlx-lm"]["peak_concurrency"] < 16 + 8
    shared = rows_of(content, "W4", "64 shared")
    assert shared["mlx-paged"]["prefix_hits"] == 15 * 64
    assert shared["mlx-paged, no prefix cache"]["prefix_hits"] == 0
    assert rows_of(content, "W4", "none shared")["mlx-paged"]["prefix_hits"] == 0
    assert shared["mlx-paged"]["kv_peak_mb"] < shared["mlx-paged, no prefix cache"]["kv_peak_mb"]
    samples = rows_of(content, "W5", "4 samples")
    assert samples["mlx-paged, n=4"]["kv_peak_mb"] < samples["mlx-paged, 4 requests"]["kv_peak_mb"]
    overload = rows_of(content, "W7")
    assert overload["mlx-paged, all of it"]["preemptions"] == 0
    assert overload["mlx-paged, computed again"]["preemptions"] > 0
    waste = [row["kv_waste"] for row in content["results"]["W8"]]
    in_order = [waste[1], waste[0], *waste[2:]]  # blocks of 8, 16, 32, 64, 128
    assert in_order == sorted(in_order)


@pytest.mark.skipif(not LONG, reason="takes long: MLX_PAGED_LONG_TESTS=1 runs it")
@pytest.mark.slow
def test_workloads_can_be_chosen_and_made_smaller_for_any_model(tmp_path: Path) -> None:
    file = tmp_path / "two.json"
    options = ("--model", ROOT / "models" / "demo", "--only", "W2,W1", "--scale", "32", "--repetitions", "1")
    printed = run_benchmark(*options, "--json", file, script="workloads.py")
    results = json.loads(file.read_text())["results"]
    assert list(results) == ["W1", "W2"]
    check_comparison(results)
    assert f"W1, equal lengths, {ROOT / 'models' / 'demo'}" in printed


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--only", "W1,W99"], "there is no part 'W99': they are W1, W2"),
        (["--scale", "0"], "--scale: '0' is no whole number of at least 1"),
        (["--model", "/no/such/folder", "--only", "W1"], "/no/such/folder"),
        (["--model", str(ROOT / "models" / "demo"), "--only", "W6"],
         "W6 (4 x 4,096 in) takes 4,160 tokens of context, and the model was made for 2,048"),
        (["--llama-server", "x"], "--llama-server takes the model that --model names"),
        (["--llama-server", "x", "--model", str(ROOT / "models" / "demo"), "--only", "W1"],
         "--llama-server: a GGUF file is written of plain llama and gemma3_text models, not of"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_told_without_a_traceback(
    args: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["workloads.py", *args])
    with pytest.raises(SystemExit) as end:
        importlib.import_module("workloads").main()
    assert end.value.code not in (0, None)
    said = f"{end.value.code}\n{capsys.readouterr().err}"  # a text is what Python writes to stderr at the end
    assert words in said and "Traceback" not in said


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


@pytest.mark.slow
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
            assert row["peak_concurrency"] == row["most"]


@pytest.mark.slow
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
