"""Models whose layers keep states, against mlx-lm: a run asks both, and what is committed says what the pages claim."""

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
    """Fails unless the rows are complete, each number is one that could be, and no row of ours is wrong."""
    check_machine(content, "hybrids.py", "mlx_lm")
    chat, short = content["results"]["chat"], content["results"]["short_prompts"]
    for rows in (chat, short):
        for row in rows:
            assert row.keys() == rows[0].keys()
            assert all(math.isfinite(value) and value > 0 for value in row.values() if not isinstance(value, str)), row
    for row in chat:
        assert all(row[f"{name} computed"] <= row["prompt"] for name in importlib.import_module("hybrids").SYSTEMS)
    for row in short:
        right, _, all_rows = row["mlx-paged right"].partition(" of ")
        assert right == all_rows


@pytest.mark.skipif(not LONG, reason="takes long: MLX_PAGED_LONG_TESTS=1 runs it")
@pytest.mark.slow
def test_a_quick_run_asks_both(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    printed = run_benchmark("--quick", "--json", file, script="hybrids.py")
    check(json.loads(file.read_text()))
    assert "the last question in other words" in printed


def test_the_committed_results_are_of_a_full_run_whose_next_turns_compute_little_more_than_is_new() -> None:
    content = json.loads((RESULTS / "hybrids-linux-cpu.json").read_text())
    check(content)
    assert "--quick" not in content["machine"]["command"]
    first, *turns = content["results"]["chat"]
    new = [row["prompt"] - before["prompt"] for before, row in zip([first, *turns], turns[:9], strict=False)]
    answer = 300
    for count, row in zip(new, turns[:9], strict=True):
        assert row["mlx-paged computed"] <= count - answer + 2 * 16, "what the last turn added, and two blocks at most"
    assert {row["family"] for row in content["results"]["short_prompts"]} == set(
        importlib.import_module("hybrids").SHAPES
    )
