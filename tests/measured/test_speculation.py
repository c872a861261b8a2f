"""What drafts save: a run measures all ways, with the same tokens; what is committed keeps to what the page claims."""

from __future__ import annotations

import importlib
import json
from typing import Any

import page_tables
import pytest
from helpers.run_benchmark import RESULTS, ROOT, check_machine

WAYS = ["none", "where they pay", "always"]
OF_A_MODEL = ["a model's, where they pay", "a model's, always"]
MLX_LM = ["mlx-lm, none", "mlx-lm, a model's"]
Ways = dict[str, dict[str, Any]]


def by_task(rows: list[dict[str, Any]]) -> dict[tuple[str, int], Ways]:
    """The rows of each task and number of requests at once, by how they were run; all of them checked."""
    tasks = page_tables.by_task(rows)
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


@pytest.mark.parametrize("file", ["speculation-smollm2-linux-cpu.json", "speculation-deeper-linux-cpu.json"])
def test_the_committed_runs_have_the_same_tokens_and_their_command_is_on_the_page(file: str) -> None:
    content = json.loads((RESULTS / file).read_text())
    check_machine(content, "speculation.py", "model")
    page = " ".join((ROOT / "docs" / "speculation.md").read_text().split())
    assert f"`{content['machine']['command'].split(' --json')[0]}`" in page
    by_task(content["results"]["drafts"])


def test_drafts_that_are_looked_up_take_no_longer_than_none_and_where_they_pay_little_more_than_half() -> None:
    content = json.loads((RESULTS / "speculation-smollm2-linux-cpu.json").read_text())
    tasks = by_task(content["results"]["drafts"])
    assert {batch for _, batch in tasks} == {1, 4, 16}
    ratios = [ways["where they pay"]["ratio"] for ways in tasks.values()]
    assert max(ratios) <= 1.03 and min(ratios) < 0.6


def test_copying_a_passage_takes_half_of_the_steps_at_most() -> None:
    content = json.loads((RESULTS / "speculation-smollm2-linux-cpu.json").read_text())
    ways = by_task(content["results"]["drafts"])["copy", 1]
    assert 2 * ways["where they pay"]["steps"] <= ways["none"]["steps"]
