"""The page of results is what benchmarks/results_page.py writes of the committed files."""

from __future__ import annotations

import json
from pathlib import Path

import page_tables
import pytest
import results_page
from helpers.run_benchmark import RESULTS, ROOT

PAGE = RESULTS / "README.md"


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    assert PAGE.read_text() == results_page.page(), "run python benchmarks/results_page.py"


def test_every_file_of_results_is_on_the_page_with_its_command_and_its_tables() -> None:
    page = PAGE.read_text()
    assert {file.name for file in RESULTS.glob("*.json")} == set(results_page.FILES)
    for file, (_, title, hidden) in results_page.FILES.items():
        content = json.loads((RESULTS / file).read_text())
        section = page.split(f"## {title}\n")[1].split("\n## ")[0]
        assert content["machine"]["command"] in section
        assert section.count("\n| --") == len(content["results"]) - len(hidden)
        shown = [rows for part, rows in content["results"].items() if part not in hidden]
        assert section.count("\n| ") == sum(len(rows) + 2 for rows in shown)


@pytest.mark.parametrize("file", [file for file in results_page.FILES if file.startswith("workloads")])
def test_every_row_of_the_committed_workloads_served_something(file: str) -> None:
    results = json.loads((RESULTS / file).read_text())["results"]
    rows = [row for part in results.values() for row in part]
    assert all(row["tokens_per_s"] > 0 and row["requests"] * row["output_tokens"] > 0 for row in rows)


@pytest.mark.parametrize("file", page_tables.PAGES, ids=lambda file: file.name)
def test_the_tables_of_pages_are_those_of_the_committed_results(file: Path) -> None:
    page = file.read_text()
    assert page_tables.fill(page) == page, "run python benchmarks/results_page.py"
    assert page.count("<!-- table ") == page.count("<!-- end -->") > 0


def test_a_row_of_the_readme_has_the_numbers_of_its_case() -> None:
    results = json.loads((RESULTS / "workloads-smollm2-linux-cpu.json").read_text())["results"]
    rows = {row["system"]: row for row in results["W2"]}
    (line,) = [line for line in (ROOT / "README.md").read_text().splitlines() if "mixed lengths" in line]
    cells = line.split(" | ")
    systems = ("mlx-lm", "llama.cpp", "mlx-paged")
    speeds = [float(cell) for cell in cells[1:4]]
    assert speeds == pytest.approx(
        [rows[name]["output_tokens"] / rows[name]["cpu_seconds"] for name in systems], abs=0.05
    )
    assert float(cells[4].rstrip("x")) == pytest.approx(speeds[2] / speeds[0], rel=0.02)
    assert cells[5:7] == [f"{rows[name]['kv_peak_mb']:,.0f}" for name in systems[:2]]
