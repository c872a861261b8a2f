"""Requests of many kinds, W1 to W8, in this engine and in mlx-lm's BatchGenerator: speed, latency, memory.

    python benchmarks/workloads.py [--quick] [--only W2] [--json FILE]     measure, print tables, write raw numbers
    python benchmarks/workloads.py --markdown FILE                         the tables of such a file

What the workloads are is in comparison/workloads.py, how they are measured in comparison/compare.py. They run with 21
million random weights in float32, or with any model. On a CPU of a machine that does other work too, only the ratios
tell something: by CPU time how much work there was, by the clock also how it was divided among the cores.
"""

from __future__ import annotations

from functools import cache

import mlx_lm
import report
from comparison.compare import COLUMNS, compare
from comparison.workloads import WORKLOADS, Workload
from report import Part, Row

from mlx_paged.models.loading import LoadedModel
from mlx_paged.tools.random_models import make_random_model

QUICK_SCALE, REPETITIONS = 32, 3


@cache
def model(quick: bool) -> LoadedModel:
    """Random weights; in a quick run only a few."""
    return make_random_model("qwen2-tiny" if quick else "qwen2-20m", "float32")


def part(workload: Workload) -> Part:
    def run(quick: bool) -> list[Row]:
        cases = workload.cases(QUICK_SCALE if quick else 1)
        return [row for case in cases for row in compare(case, model(quick), 1 if quick else REPETITIONS)]

    run.__name__ = workload.name
    return Part(run, f"{workload.name}, {workload.about}", COLUMNS)


if __name__ == "__main__":
    parts = [part(workload) for workload in WORKLOADS.values()]
    report.main("workloads.py", __doc__, parts, mlx_lm=mlx_lm.__version__)
