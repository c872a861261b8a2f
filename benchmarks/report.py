"""What the benchmarks share: parts that measure, tables of them in a terminal or in Markdown, and raw JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from rich.console import Console

from mlx_paged.bench_report import Columns, Row, describe_machine, markdown, terminal_table


class Part(NamedTuple):
    """A measurement; columns: key in its rows -> heading and format."""

    run: Callable[[bool], list[Row]]
    title: str
    columns: Columns


def main(script: str, purpose: str, parts: Sequence[Part], **details: Any) -> None:
    """The command line of the benchmark `script`. details: what its numbers depend on beside MLX, such as versions."""
    parser = argparse.ArgumentParser(description=purpose.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes and few repetitions: only to see it run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw numbers")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="only print the tables of such a file")
    parser.add_argument("--only", choices=[part.run.__name__ for part in parts], help="measure one part")
    options = parser.parse_args()
    if options.markdown:
        results = json.loads(options.markdown.read_text())["results"]
        for part in parts:
            if part.run.__name__ in results:
                print(f"{part.title}:\n\n{markdown(part.columns, results[part.run.__name__])}\n")
        return
    machine = describe_machine(" ".join([f"python benchmarks/{script}", *sys.argv[1:]]), **details)
    console = Console(highlight=False)
    results = {}
    for part in parts:
        if options.only not in (None, part.run.__name__):
            continue
        mx.random.seed(0)
        rows = results[part.run.__name__] = part.run(options.quick)
        console.print(terminal_table(part.title, part.columns, rows), "")
        if options.json:  # after each part, so that what was measured outlives a later part's failure
            options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
