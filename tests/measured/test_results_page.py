"""The page of results is what benchmarks/results_page.py writes of the committed files."""

from __future__ import annotations

import json

import results_page
from helpers.run_benchmark import RESULTS

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
