"""Requests of many kinds, W1 to W8, in this engine and in mlx-lm's BatchGenerator: speed, latency, memory.

    python benchmarks/workloads.py [--quick] [--only W1,W2] [--json FILE]    measure, print tables, write raw numbers
    python benchmarks/workloads.py --model qwen2 --scale 4                   another model, a quarter of the tokens
    python benchmarks/workloads.py --markdown FILE                           the tables of such a file

What the workloads are is in comparison/workloads.py, how they are measured in comparison/compare.py. They run with 21
million random weights in float32 and random prompts, or with any model, whose prompts are passages of this project's
pages; with --llama-server also in llama.cpp's server, which is given the same weights as a GGUF file. On a CPU of a
machine that does other work too, only the ratios tell something: by CPU time how much work there was, by the clock also
how it was divided among the cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from mlx_paged import LLM  # isort: skip  # noqa: F401  (before mlx, so that it finds OpenBLAS)
import mlx_lm
import report
from comparison.compare import COLUMNS, compare
from comparison.gguf_file import gguf_in
from comparison.workloads import WORKLOADS, Workload
from report import Part, Row

from mlx_paged.errors import ModelError
from mlx_paged.models.hub import resolve
from mlx_paged.models.loading import LoadedModel, load
from mlx_paged.tools.random_models import SHAPES, make_random_model

QUICK_SCALE, REPETITIONS = 32, 3
ROOT = Path(__file__).parents[1]


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


@cache
def prose(name: str) -> list[int]:
    """Encode the project's pages with a model's tokenizer."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    tokenizer = chosen_model(name, None).tokenizer
    return [token for page in pages for token in tokenizer.encode(page.read_text(), add_special_tokens=False)]


def part(workload: Workload, options: argparse.Namespace, folder: str = "") -> Part:
    chosen = options.model or options.random_weights

    def run(quick: bool) -> Iterator[Row]:
        model = chosen_model(options.model, options.random_weights) if chosen else random_model(quick)
        repetitions = options.repetitions or (1 if quick else REPETITIONS)
        text = prose(options.model) if options.model else None
        llama_cpp = (
            (options.llama_server, gguf_in(folder, resolve(options.model), "workloads.py", options.llama_server))
            if options.llama_server
            else None
        )
        for case in workload.cases(options.scale or (QUICK_SCALE if quick else 1)):
            if options.cases is None or options.cases in case.label:
                yield from compare(case.beside_llama_cpp() if llama_cpp else case, model, repetitions, text, llama_cpp)

    run.__name__ = workload.name
    return Part(run, f"{workload.name}, {workload.about}" + (f", {chosen}" if chosen else ""), COLUMNS)


DEFAULTS = argparse.Namespace(
    model=None, random_weights=None, scale=None, repetitions=None, llama_server=None, cases=None
)
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
    parser.add_argument("--cases", metavar="WORDS", help="only those whose names have these words")
    parser.add_argument("--llama-server", metavar="FILE", help="llama.cpp's server, to run beside; takes --model")
    options, _ = parser.parse_known_args()
    if options.llama_server and not options.model:
        parser.error("--llama-server takes the model that --model names")
    with tempfile.TemporaryDirectory() as folder:
        parts = [part(workload, options, folder) for workload in WORKLOADS.values()]
        report.main("workloads.py", __doc__, parts, own_options=[parser], mlx_lm=mlx_lm.__version__)


if __name__ == "__main__":
    main()
