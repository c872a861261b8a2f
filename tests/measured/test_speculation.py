"""What drafts save: a run measures all ways, with the same tokens; what is committed keeps to what the page claims."""

from __future__ import annotations

import importlib
import json
import re
from typing import Any

import pytest
from helpers.run_benchmark import RESULTS, ROOT, check_machine

WAYS = ["none", "where they pay", "always"]


def check_rows(rows: list[dict[str, Any]]) -> None:
    """Fail unless each task has been run in all ways, with the same tokens."""
    assert [row["drafts"] for row in rows] == WAYS * (len(rows) // 3)
    for plain, adaptive, always in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert plain["ratio"] == 1 and plain["verified"] == plain["right"] == 0
        for row in (adaptive, always):
            assert row["equal"] == "yes" and row["right"] <= row["verified"]
            assert row["steps"] <= plain["steps"] and row["ratio"] > 0


def test_a_quick_run_answers_in_all_ways_with_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = importlib.import_module("speculation")
    monkeypatch.setattr(benchmark, "TASKS", {"chat": benchmark.TASKS["chat"]})
    rows = list(benchmark.drafts(quick=True))
    assert len(rows) == 3
    check_rows(rows)


def test_the_committed_run_is_the_page_s_table() -> None:
    content = json.loads((RESULTS / "speculation-smollm2-linux-cpu.json").read_text())
    check_machine(content, "speculation.py", "model")
    rows = content["results"]["drafts"]
    check_rows(rows)
    page = (ROOT / "docs" / "speculation.md").read_text()
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if re.match(r"\| \w+ \|", line)
    ]
    table = {(task, int(batch)): numbers for task, batch, *numbers in cells if batch.isdigit()}
    found = {}
    for _, adaptive, always in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        shown = [f"{adaptive['ratio']:.2f}", f"{always['ratio']:.2f}", f"{adaptive['right']} of {adaptive['verified']}"]
        found[adaptive["task"], adaptive["batch"]] = shown
    assert table == found
