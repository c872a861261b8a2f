"""The script that is run beside an NVIDIA card: all of its parts, on the simulator."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from cudasim import Cuda
from cudasim.fixture import cuda as cuda
from metalsim.order import AccessOrder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_everything_to_be_measured_on_a_card_can_be(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator = cuda.only_simulated("the benchmark is run without measuring")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    on_a_gpu = importlib.import_module("on_a_gpu")
    monkeypatch.setattr(on_a_gpu, "run_tests", lambda files: "none failed")
    serving = importlib.import_module("gpu_serving")
    decode_run = serving.decode_run

    def decode_anew(*arguments: Any) -> Any:
        """Another engine's pools may lie where the last one's did, and hold the same."""
        simulator.order = AccessOrder()
        return decode_run(*arguments)

    monkeypatch.setattr(serving, "decode_run", decode_anew)
    results = {part.run.__name__: part.run(True) for part in on_a_gpu.PARTS}
    assert [row["same"] for row in results["wrapper"]] == ["yes"] * 6
    assert all(float(row["result"].split()[-1]) < 8e-3 for row in results["correctness"][2:])
    assert all(row["share"] > 0 for part in ("decode", "prefill") for row in results[part])
    assert all(row["backend"] == "cuda" and row["error"] < 2e-2 for row in results["latent"])
    assert {(row["way"], row["same"]) for row in results["draws"]} == {("plain", "2 of 2"), ("cuda", "2 of 2")}
    assert {(row["writes"], row["tokens"] > 0) for row in results["writes"]} == {("kernel", True), ("scatter", True)}
    assert len(results["submission"]) == 2 and all(row["tokens_per_s"] > 0 for row in results["submission"])
    assert all(row["microseconds"] > 0 for row in results["uploads"])
    assert all(row["kv"] > 0 for row in results["memory"])
    assert {row["system"] for row in results["end_to_end"]} == {"mlx-lm", "mlx-paged"}


def test_the_test_files_that_it_runs_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    named = [file for files in importlib.import_module("on_a_gpu").TESTS.values() for file in files]
    assert [file for file in named if not (BENCHMARKS.parent / "tests" / file).is_file()] == []


def test_without_a_card_the_benchmark_says_so() -> None:
    if mx.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, BENCHMARKS / "on_a_gpu.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "on_a_gpu.py: there is no CUDA device here" in done.stderr
