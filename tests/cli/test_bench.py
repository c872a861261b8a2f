"""`mlx-paged bench`: its tables and JSON at tiny sizes, and what bad input is told. Nothing here is about speed."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import click.testing
import mlx.core as mx
import pytest

from mlx_paged.cli.bench import _duration
from mlx_paged.cli.main import cli
from mlx_paged.tools import speed
from mlx_paged.tools.report import as_text, describe_machine, terminal_table

SOMETIMES = {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "device_name", "architecture"}  # where set, on a GPU
MACHINE = {"platform", "device", "cpu_count", "python", "mlx", "mlx_lm", "preloaded", "command"}


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


@pytest.mark.parametrize(
    ("backend", "rule"),
    [("cpu", "computed once where that saves reading 4,096 keys or more"), ("reference", "read by each sequence")],
)
def test_verbose_says_what_becomes_of_shared_prefixes_where_there_are_no_kernels(
    backend: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mx.default_device() != mx.cpu:
        pytest.skip("this is a GPU")
    monkeypatch.setenv("MLX_PAGED_BACKEND", backend)
    line = f"shared prefixes: {rule}; no kernel is used here, and plain operations are not timed"
    smallest = ("--random-weights", "qwen2-tiny", "-p", 1, "-g", 0, "-b", 1, "-n", 1)
    assert line in run(*smallest, "-v").stderr.splitlines()
    assert "shared prefixes" not in run(*smallest).stderr


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
    for option in ("--random-weights", "-p ", "-g ", "-b ", "--repetitions", "--output", "--block-size"):
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
        (["--dtype", "int4"], "--dtype must be one of float32"),
        (["compare"], "compare"),
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
        (["--model", "/no/such/folder"], "/no/such/folder"),
        (["--num-kv-blocks", "2", "-p", "100", "-g", "0"], "100"),
    ],
)
def test_what_does_not_fit_the_model_is_told_in_one_line(args: list[str], words: str) -> None:
    result = run(*args)
    assert result.exit_code == 1
    assert words in result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("mlx-paged: ")


@pytest.mark.parametrize("command", ["bench -p 8 -g 8", "generate Hi"])
def test_a_draft_model_of_another_vocabulary_is_refused(command: str, demo_folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(demo_folder, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["re"], words["il"] = words["il"], words["re"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = click.testing.CliRunner().invoke(cli, [*command.split(), "--draft-model", str(other)])
    assert result.exit_code == 1 and "can't guess this model's tokens: token 301 is 're' here and" in result.stderr


def test_a_table_that_is_wider_than_the_terminal_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    words = [f"unabbreviated{i}" for i in range(20)]
    columns = {word: (word, "") for word in words}
    table = as_text(terminal_table("title", columns, [{word: f"value of {word}" for word in words}]))
    assert table.split() == ["title", *words, *" ".join(f"value of {word}" for word in words).split()]
    assert len(table.splitlines()) == 3


def test_it_says_beforehand_how_long_it_will_take() -> None:
    result = run(*SMALL, "-v")
    assert result.exit_code == 0
    assert re.search(r"^this will take about \d+ s$", result.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (89, "89 s"), (91, "2 min"), (3000, "50 min"), (9000, "2.5 h")]
)
def test_a_rough_duration_is_told_in_a_fitting_unit(seconds: float, words: str) -> None:
    assert _duration(seconds) == words


def test_the_estimate_grows_with_tokens_batches_and_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    # A token of a prompt takes 2 s, a step of a batch 3 s.
    def seconds(llm: object, batch: int, num_prompt: int, num_output: int, draw: object) -> int:
        return 2 * num_prompt * batch if num_output == 1 else 3 * num_output

    monkeypatch.setattr(speed, "_seconds", seconds)
    assert speed.estimate_duration(MagicMock(), 100, 0, [1, 3], 1) == 2 * 100 * 2 * (1 + 3)
    assert speed.estimate_duration(MagicMock(), 0, 50, [1, 3], 4) == 5 * 50 * 3 * 2


INTERRUPTED = """
import hashlib
from mlx_paged.cli import bench, main

def compute(*_):
    print("computing", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes, in which Python handles no signal

bench.measure_speed = compute
main.main()
"""


def test_ctrl_c_ends_it_soon_in_a_computation_that_python_cannot_interrupt() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, "bench", *map(str, SMALL)],
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None and process.stdout.readline() == b"computing\n"
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(timeout=30) == 130
    finally:
        process.kill()
