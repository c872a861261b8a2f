"""Requests of many kinds, W1 to W8, in this engine and in mlx-lm's BatchGenerator: speed, latency, memory.

    python benchmarks/workloads.py [--quick] [--only W1,W2] [--json FILE]    measure, print tables, write raw numbers
    python benchmarks/workloads.py --model qwen2 --scale 4                   another model, a quarter of the tokens
    python benchmarks/workloads.py --markdown FILE                           the tables of such a file

What the workloads are is in comparison/workloads.py, how they are measured in comparison/compare.py. They run with 21
million random weights in float32, or with any model. On a CPU of a machine that does other work too, only the ratios
tell something: by CPU time how much work there was, by the clock also how it was divided among the cores.
"""

from __future__ import annotations

import argparse
import sys
from functools import cache

import mlx_lm
import report
from comparison.compare import COLUMNS, compare
from comparison.workloads import WORKLOADS, Workload
from report import Part, Row

from mlx_paged.errors import ModelError
from mlx_paged.models.loading import LoadedModel, load
from mlx_paged.tools.random_models import SHAPES, make_random_model

QUICK_SCALE, REPETITIONS = 32, 3


@cache
def random_model(quick: bool) -> LoadedModel:
    """Make the model of comparisons: random weights; in a quick run only a few."""
    return make_random_model("qwen2-tiny" if quick else "qwen2-20m", "float32")


@cache
def chosen_model(name: str | None, shape: str | None) -> LoadedModel:
    """Load the model that --model or --random-weights names. Ends the program if it can't be had."""
    try:
        return load(name, None) if shape is None else make_random_model(shape)
    except ModelError as error:
        sys.exit(f"workloads.py: {error}")


def part(workload: Workload, options: argparse.Namespace) -> Part:
    chosen = options.model or options.random_weights

    def run(quick: bool) -> list[Row]:
        model = chosen_model(options.model, options.random_weights) if chosen else random_model(quick)
        repetitions = options.repetitions or (1 if quick else REPETITIONS)
        cases = workload.cases(options.scale or (QUICK_SCALE if quick else 1))
        return [row for case in cases for row in compare(case, model, repetitions)]

    run.__name__ = workload.name
    return Part(run, f"{workload.name}, {workload.about}" + (f", {chosen}" if chosen else ""), COLUMNS)


DEFAULTS = argparse.Namespace(model=None, random_weights=None, scale=None, repetitions=None)
PARTS = [part(workload, DEFAULTS) for workload in WORKLOADS.values()]


def positive(value: str) -> int:
    """Read a whole number of at least 1."""
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is no whole number of at least 1")
    return int(value)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(add_help=False)
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--model", help="alias, Hugging Face repository or folder; default: 21 million random weights")
    models.add_argument("--random-weights", choices=SHAPES, help="random weights of this shape instead")
    parser.add_argument("--scale", type=positive, metavar="N", help="divide numbers of tokens by this; default: 1")
    parser.add_argument("--repetitions", type=positive, metavar="N", help=f"default: {REPETITIONS}")
    options, _ = parser.parse_known_args()
    parts = [part(workload, options) for workload in WORKLOADS.values()]
    report.main("workloads.py", __doc__, parts, own_options=[parser], mlx_lm=mlx_lm.__version__)


if __name__ == "__main__":
    main()
