"""How cost grows: no time of the host by more than what there is; the committed run has the sizes that are claimed."""

from __future__ import annotations

import importlib
import json
import math
from itertools import pairwise
from typing import Any

import pytest
from helpers.run_benchmark import RESULTS, check_machine

SIZES = {
    "sequences": (1, 256),
    "context": (1 << 10, 1 << 16),
    "pool": (10**3, 10**6),
    "prefixes": (1 << 10, 1 << 20),
    "queue": (1, 100_000),
}


def check_rows(rows: list[dict[str, Any]]) -> None:
    """Fail unless rows of a part have all that a table shows, and each exponent follows from its times."""
    size = next(iter(rows[0]))
    times = [key for key in rows[0] if key.endswith("_us")]
    assert {"host_us", "graph_us"} <= set(times)
    for before, row in pairwise(rows):
        assert row.keys() == rows[0].keys() and row["tokens_per_s"] > 0 and row["memory_mib"] >= 0
        for key in times:
            steps = math.log(row[size] / before[size])
            assert row[f"{key}_growth"] == pytest.approx(math.log(row[key] / before[key]) / steps)


def test_no_time_of_the_committed_run_grows_faster_than_what_there_is() -> None:
    content = json.loads((RESULTS / "growth-linux-cpu.json").read_text())
    check_machine(content, "growth.py")
    assert "--quick" not in content["machine"]["command"]
    for part, rows in content["results"].items():
        least, most = SIZES[part]
        check_rows(rows)
        sizes = [next(iter(row.values())) for row in rows]
        assert (sizes[0], sizes[-1]) == (least, most) and sizes == sorted(sizes)
        for key in (key for key in rows[0] if key.endswith("_us")):
            assert math.log(rows[-1][key] / rows[0][key]) / math.log(most / least) < 1.05, f"{part}: {key}"


@pytest.mark.slow
@pytest.mark.parametrize("part", ["pool", "prefixes", "queue"])
def test_a_quick_run_measures_what_it_says(part: str) -> None:
    benchmark = importlib.import_module("growth")
    check_rows(getattr(benchmark, part)(True))


def test_a_time_that_grows_with_the_square_is_said_to() -> None:
    benchmark = importlib.import_module("growth")
    rows = benchmark.with_growth(
        "size", [{"size": size, "flat_us": 7.0, "square_us": 1.5 * size**2} for size in (2, 8, 24)]
    )
    assert [(row["flat_us_growth"], row["square_us_growth"]) for row in rows[1:]] == [(0, pytest.approx(2))] * 2
