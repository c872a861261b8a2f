"""What drafts save: a run measures all ways, with the same tokens; what is committed keeps to what the page claims."""

from __future__ import annotations

import importlib
import json
import re
from typing import Any

import pytest
from helpers.run_benchmark import RESULTS, ROOT, check_machine

WAYS = ["none", "where they pay", "always"]
OF_A_MODEL = ["a model's, where they pay", "a model's, always"]
MLX_LM = ["mlx-lm, none", "mlx-lm, a model's"]
Ways = dict[str, dict[str, Any]]


def by_task(rows: list[dict[str, Any]]) -> dict[tuple[str, int], Ways]:
    """The rows of each task and number of requests at once, by how they were run; all of them checked."""
    tasks: dict[tuple[str, int], Ways] = {}
    for row in rows:
        tasks.setdefault((row["task"], row["batch"]), {})[row["drafts"]] = row
    for ways in tasks.values():
        assert list(ways) in (WAYS, WAYS + OF_A_MODEL, WAYS + OF_A_MODEL + MLX_LM)
        for name, row in ways.items():
            assert row["equal"] == "yes" and row["right"] <= row["verified"] and row["ratio"] > 0
            if name in ("none", MLX_LM[0]):
                assert row["ratio"] == 1 and row["verified"] == row["right"] == 0
            elif name not in MLX_LM:
                assert row["steps"] <= ways["none"]["steps"]
    return tasks


def test_a_quick_run_answers_in_all_ways_with_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = importlib.import_module("speculation")
    monkeypatch.setattr(benchmark, "TASKS", {"chat": benchmark.TASKS["chat"]})
    demo = str(ROOT / "models" / "demo")
    monkeypatch.setattr(benchmark.OPTIONS, "draft_model", demo)
    ((_, ways),) = by_task(list(benchmark.drafts(quick=True))).items()
    assert list(ways) == WAYS + OF_A_MODEL + MLX_LM
    always = ways["a model's, always"]
    assert always["right"] == always["verified"] > 0, "the draft model is the model"


def test_the_committed_run_is_the_page_s_table() -> None:
    content = json.loads((RESULTS / "speculation-smollm2-linux-cpu.json").read_text())
    check_machine(content, "speculation.py", "model")
    page = (ROOT / "docs" / "speculation.md").read_text()
    assert content["machine"]["command"].split(" --json")[0] in " ".join(page.split())
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if re.match(r"\| \w+ \|", line)
    ]
    table = {(task, int(batch)): numbers for task, batch, *numbers in cells if batch.isdigit()}
    found = {}
    for key, ways in by_task(content["results"]["drafts"]).items():
        adaptive = ways["where they pay"]
        shown = [f"{ways[name]['ratio']:.2f}" for name in WAYS[1:]]
        shown += [f"{adaptive['right']} of {adaptive['verified']}", f"{adaptive['steps']} of {ways['none']['steps']}"]
        found[key] = shown
    assert table == found


def test_copying_a_passage_takes_half_of_the_steps_at_most() -> None:
    content = json.loads((RESULTS / "speculation-smollm2-linux-cpu.json").read_text())
    ways = by_task(content["results"]["drafts"])["copy", 1]
    assert 2 * ways["where they pay"]["steps"] <= ways["none"]["steps"]
