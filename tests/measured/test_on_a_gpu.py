"""The script that is run beside an NVIDIA card: all of its parts, on the simulator."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from cudasim import Cuda
from cudasim.fixture import cuda as cuda
from helpers.parts_here import run_here
from metalsim.order import AccessOrder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_everything_to_be_measured_on_a_card_can_be(
    cuda: Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulator = cuda.only_simulated("the benchmark is run without measuring")
    on_a_gpu, report = importlib.import_module("on_a_gpu"), importlib.import_module("report")
    monkeypatch.setattr(on_a_gpu, "run_tests", lambda *_, **__: {"result": "none failed", "log": ""})
    serving = importlib.import_module("gpu_serving")
    decode_run = serving.decode_run

    def decode_anew(*arguments: Any) -> Any:
        """Another engine's pools may lie where the last one's did, and hold the same."""
        simulator.order = AccessOrder()
        return decode_run(*arguments)

    monkeypatch.setattr(serving, "decode_run", decode_anew)
    speed = {"test": "tg2", "batch": 1, "tokens_per_s": 1.0, "deviation": 0.0}
    bench = SimpleNamespace(returncode=0, stdout=json.dumps({"results": {"speed": [speed]}}))
    monkeypatch.setattr(serving, "run_python", lambda *_, **__: bench)
    file = tmp_path / "results.json"

    def main() -> None:
        report.main("on_a_gpu.py", "", on_a_gpu.PARTS, apart=True, file=file)

    assert run_here(monkeypatch, main, "on_a_gpu.py", "--quick") == ""
    results = json.loads(file.read_text())["results"]
    assert list(results) == [part.run.__name__ for part in on_a_gpu.PARTS]
    assert [row["same"] for row in results["wrapper"]] == ["yes"] * 6
    assert all(float(row["result"].split()[-1]) < 8e-3 for row in results["correctness"][:-2])
    assert all(row["share"] > 0 for part in ("decode", "prefill") for row in results[part])
    assert all(row["backend"] == "cuda" and row["error"] < 2e-2 for row in results["latent"])
    assert {(row["way"], row["same"]) for row in results["draws"]} == {("plain", "2 of 2"), ("cuda", "2 of 2")}
    assert {(row["writes"], row["tokens"] > 0) for row in results["writes"]} == {("kernel", True), ("scatter", True)}
    assert {row["in_place"] for row in results["writer"]} == {"yes"}
    for part in ("few_queries", "shared_prefix"):
        assert all(row["backend"] == "cuda" and row["agrees"] == "yes" for row in results[part])
    assert all(row["microseconds"] > 0 for row in results["uploads"])
    assert all(row["kv"] > 0 for row in results["memory"])
    assert {row["system"] for row in results["end_to_end"]} == {"mlx-lm", "mlx-paged"}


def test_results_are_named_for_the_card() -> None:
    assert importlib.import_module("on_a_gpu").file_name("NVIDIA H100 80GB HBM3") == (
        "on-a-gpu-nvidia-h100-80gb-hbm3.json"
    )


def test_the_test_files_that_it_runs_exist() -> None:
    named = [file for files in importlib.import_module("on_a_gpu").TESTS.values() for file in files]
    assert [file for file in named if not (BENCHMARKS.parent / "tests" / file).is_file()] == []


def test_without_a_card_the_benchmark_says_so() -> None:
    if mx.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, BENCHMARKS / "on_a_gpu.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "on_a_gpu.py: there is no CUDA device here" in done.stderr
