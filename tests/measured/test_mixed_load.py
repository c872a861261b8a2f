"""The load that conversations, questions and documents make, as it comes to two systems at once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import mixed_load
import pytest
from helpers.run_benchmark import RESULTS, check_machine, run_benchmark

from mlx_paged.config import parse_memory


def test_the_same_requests_come_each_time_more_of_them_in_busy_minutes() -> None:
    asked = mixed_load.requests(3600, 1.0)
    assert asked == mixed_load.requests(3600, 1.0)
    times = [one.at_s for one in asked]
    assert times == sorted(times) and times[-1] < 3600
    kinds = Counter(one.kind for one in asked)
    assert kinds["turn"] > kinds["question"] > kinds["document"] > len(asked) / 20
    assert all((one.client >= 0) == (one.kind == "turn") for one in asked)
    quiet, busy = (sum(start <= at % 600 < start + 100 for at in times) for start in (0, 250))
    assert busy > 1.5 * quiet


@pytest.mark.slow
def test_both_answer_and_the_pool_keeps_to_its_size(tmp_path: Path) -> None:
    run_benchmark("--quick", "--json", tmp_path / "load.json", script="mixed_load.py")
    check(json.loads((tmp_path / "load.json").read_text()))


def test_the_committed_results_are_of_a_whole_load() -> None:
    content = json.loads((RESULTS / "mixed-load-linux-cpu.json").read_text())
    check(content)
    rows = content["results"]["mixed_load"]
    for system in ("mlx-paged", "mlx-lm"):
        own = [row for row in rows if row["system"] == system]
        assert [row["minute"] for row in own] == pytest.approx([(i + 1) / 6 for i in range(len(own))], abs=1e-3)
        assert own[-1]["answered"] > 40 * own[-1]["minute"] and own[-1]["running"] < 50


def check(content: dict) -> None:  # type: ignore[type-arg]
    check_machine(content, "mixed_load.py", "mlx_lm")
    rows = content["results"]["mixed_load"]
    assert {row["system"] for row in rows} == {"mlx-paged", "mlx-lm"}
    pool = parse_memory(mixed_load.MEMORY) / 1e6
    for row in rows:
        assert row["held_mb"] >= row["running_mb"] - 1e-6 or row["system"] == "mlx-lm"
        assert row["system"] == "mlx-lm" or 0.99 * pool < row["held_mb"] < 1.05 * pool
