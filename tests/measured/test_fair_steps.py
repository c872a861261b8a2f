"""A stream beside a long prompt, in each server: a run asks all of them, and what is committed is of a full one."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers.budget import LONG
from helpers.run_benchmark import RESULTS, check_machine, run_benchmark


def check(content: dict[str, Any]) -> None:
    """Fails unless the rows are complete and each number is one that could be."""
    check_machine(content, "fair_steps.py", "mlx_lm")
    for rows in content["results"].values():
        assert [row["system"] for row in rows] == list(importlib.import_module("fair_steps").SYSTEMS)
        for row in rows:
            assert row.keys() == rows[0].keys()
            assert all(math.isfinite(row[key]) and row[key] >= 0 for key in row.keys() - {"system"}), row
            assert row["longest_gap_ms"] >= row["gap_p95_ms"] and row["first_token_s"] > 0


@pytest.mark.skipif(not LONG, reason="takes long: MLX_PAGED_LONG_TESTS=1 runs it")
@pytest.mark.slow
def test_a_quick_run_asks_every_server(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    run_benchmark("--quick", "--json", file, script="fair_steps.py")
    check(json.loads(file.read_text()))


def test_with_the_default_the_longest_gap_is_the_shortest_in_the_committed_results() -> None:
    content = json.loads((RESULTS / "fair-steps-linux-cpu.json").read_text())
    check(content)
    assert "--quick" not in content["machine"]["command"]
    assert content["results"]["random_weights"][0]["prompt_tokens"] > 30_000
    for limited, *others in content["results"].values():
        assert all(limited["longest_gap_ms"] < row["longest_gap_ms"] for row in others)
