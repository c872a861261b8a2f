"""`mlx-paged bench`: its tables and JSON at tiny sizes, and what bad input is told. Nothing here is about speed."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import click.testing
import mlx.core as mx
import pytest
from comparison.workloads import WORKLOADS
from helpers.run_benchmark import run_benchmark

from mlx_paged.cli.main import cli
from mlx_paged.tools.report import as_text, describe_machine, terminal_table

SOMETIMES = {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "device_name", "architecture"}  # where set, on a GPU
MACHINE = {"platform", "device", "cpu_count", "python", "mlx", "mlx_lm", "preloaded", "command"}
TEXT = {"workload", "case", "system"}


def run(*args: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(cli, ["bench", *map(str, args)])


def run_well(*args: object) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


SMALL = ("--random-weights", "qwen2-tiny", "-p", 9, "-g", 5, "-b", "1,3", "-n", 2)


# -- the speed of one model ---------------------------------------------------------------------------------------


def test_json_has_a_row_for_each_test_and_batch_size_with_all_samples() -> None:
    report = json.loads(run_well(*SMALL, "-o", "json"))
    assert set(report["machine"]) - SOMETIMES == MACHINE
    rows = report["results"]["speed"]
    assert [(row["test"], row["batch"]) for row in rows] == [("pp9", 1), ("tg5", 1), ("pp9", 3), ("tg5", 3)]
    for row in rows:
        assert set(row) == {"test", "batch", "tokens_per_s", "deviation", "samples"}
        first, second = row["samples"]
        assert row["tokens_per_s"] == pytest.approx((first + second) / 2)
        assert row["deviation"] == pytest.approx(abs(first - second) / math.sqrt(2))


def test_results_of_a_gpu_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "device_name" not in describe_machine("command")
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "A card", "architecture": "sm_90", "uuid": "1-2"})
    machine = describe_machine("command", mlx_lm="1.0")
    assert machine.items() >= {"device_name": "A card", "architecture": "sm_90", "mlx_lm": "1.0"}.items()
    assert "uuid" not in machine


def test_the_other_forms_hold_the_same_rows() -> None:
    table = run_well(*SMALL)
    for word in ("random weights, qwen2-tiny", "pp9", "tg5", "tokens/s"):
        assert word in table
    lines = run_well(*SMALL, "-o", "md").strip().split("\n")
    assert lines[2] == "| test | batch | tokens/s | ± |"
    assert lines[3] == "| --- | ---: | ---: | ---: |"
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| pp9", "| tg5", "| pp9", "| tg5"]
    rows = list(csv.DictReader(io.StringIO(run_well(*SMALL, "-o", "csv"))))
    assert [(row["test"], row["batch"]) for row in rows] == [("pp9", "1"), ("tg5", "1"), ("pp9", "3"), ("tg5", "3")]
    assert all(float(row["tokens_per_s"]) > 0 for row in rows)


def test_prompts_or_decoding_can_be_left_out() -> None:
    for args, tests in ((("-p", 0), ["tg5"]), (("-g", 0), ["pp9"])):
        report = json.loads(run_well(*SMALL, *args, "-b", 2, "-n", 1, "-o", "json"))
        rows = report["results"]["speed"]
        assert [row["test"] for row in rows] == tests
        assert rows[0]["deviation"] == 0


def test_without_a_model_it_is_the_demo_model_and_json_can_be_saved_beside_the_table(tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    table = run_well("-p", 4, "-g", 2, "-n", 1, "--save", file, "--block-size", 8)
    assert "the demo model" in table
    assert [row["test"] for row in json.loads(file.read_text())["results"]["speed"]] == ["pp4", "tg2"]


def test_help_tells_of_every_option_and_loads_nothing() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "mlx_paged", "bench", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    for option in ("--random-weights", "-p ", "-g ", "-b ", "--repetitions", "--output", "--block-size", "compare"):
        assert option in result.stdout
    assert "mlx.core" not in result.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-b", "1,x"], "-b are whole numbers with commas between them, got '1,x'"),
        (["-b", "0"], "-b must be at least 1, got 0"),
        (["-n", "0"], "-n must be at least 1, got 0"),
        (["-p", "-1"], "-p must be at least 0, got -1"),
        (["-p", "0", "-g", "0"], "leave nothing to measure"),
        (["-b", "9", "--max-num-seqs", "8"], "a batch of 9 needs --max-num-seqs of at least that, not 8"),
        (["--block-size", "0"], "--block-size must be a whole number of at least 1, got 0"),
        (["--random-weights", "gpt-9"], "'gpt-9' is not one of"),
        (["--random-weights", "llama-8b", "--model", "qwen2"], "give --model qwen2 or --random-weights llama-8b, not"),
        (["-o", "xml"], "'xml' is not one of"),
        (["-n", "2", "compare"], "options of compare come after its name"),
        (["compare", "-w", "W1,W99"], "there is no workload 'W99': they are W1, W2"),
        (["compare", "--scale", "0"], "--scale must be at least 1, got 0"),
        (["compare", "--dtype", "int4"], "--dtype must be one of float32"),
        (["compar"], "No such command 'compar'"),
    ],
)
def test_bad_usage_is_told_in_one_line(args: list[str], words: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-p", "3000"], "3001 tokens are more than the 2048 the model was made for"),
        (["compare", "-w", "W6"], "W6 (4 x 4,096 in) takes 4,160 tokens of context, and the model was made for 2,048"),
        (["--model", "/no/such/folder"], "/no/such/folder"),
        (["--num-kv-blocks", "2", "-p", "100", "-g", "0"], "100"),
    ],
)
def test_what_does_not_fit_the_model_is_told_in_one_line(args: list[str], words: str) -> None:
    result = run(*args)
    assert result.exit_code == 1
    assert words in result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("mlx-paged: ")


# -- comparisons --------------------------------------------------------------------------------------------------


def check_comparison(results: dict[str, list[dict[str, Any]]]) -> None:
    """Fails unless the rows are complete and each number is one that could be."""
    for name, rows in results.items():
        for row in rows:
            assert row["workload"] == name
            assert row.keys() == rows[0].keys()
            assert all(math.isfinite(row[key]) and row[key] >= 0 for key in row.keys() - TEXT), row
            assert row["tokens_per_s"] > 0 and 0 < row["at_once"] <= row["requests"]
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
    assert set(content["machine"]) - SOMETIMES == MACHINE
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
        assert rows["mlx-paged"]["at_once"] == 16 <= rows["mlx-lm"]["at_once"] < 16 + 8
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


def test_compare_runs_chosen_workloads_with_any_model() -> None:
    args = ("compare", "--random-weights", "qwen2-tiny", "-w", "w1,w8", "--scale", 32, "-n", 2, "-o", "json")
    report = json.loads(run_well(*args))
    assert set(report["machine"]) - SOMETIMES == MACHINE
    assert list(report["results"]) == ["W1", "W8"]
    check_comparison(report["results"])


def test_a_table_that_is_wider_than_the_terminal_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    words = [f"unabbreviated{i}" for i in range(20)]
    columns = {word: (word, "") for word in words}
    table = as_text(terminal_table("title", columns, [{word: f"value of {word}" for word in words}]))
    assert table.split() == ["title", *words, *" ".join(f"value of {word}" for word in words).split()]
    assert len(table.splitlines()) == 3


def test_compare_prints_a_table_for_each_workload_in_markdown() -> None:
    printed = run_well("compare", "--random-weights", "qwen2-tiny", "-w", "W1,W3", "--scale", 64, "-n", 1, "-o", "md")
    assert printed.count("| case | system | at once |") == 2
    assert "W3, a fixed budget of KV memory: random weights, qwen2-tiny:" in printed
