"""What the benchmarks share: parts that measure, tables of them in a terminal or in Markdown, and raw JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


class Part(NamedTuple):
    """A measurement; columns: key in its rows -> heading and format."""

    run: Callable[[bool], list[Row]]
    title: str
    columns: dict[str, tuple[str, str]]


def cells(part: Part, row: Row) -> list[str]:
    return [format(row[key], spec) for key, (_, spec) in part.columns.items()]


def markdown(part: Part, rows: list[Row]) -> str:
    """A part's table in Markdown, numbers to the right."""
    headings = [heading for heading, _ in part.columns.values()]
    rules = ["---:" if isinstance(rows[0][key], int | float) else "---" for key in part.columns]
    lines = [headings, rules, *(cells(part, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
            print(f"{part.title}:\n\n{markdown(part, results[part.run.__name__])}\n")
        return
    machine = {
        "platform": f"{platform.system()} {platform.machine()}",
        "device": str(mx.default_device()),
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        **details,
        "mlx": mx.__version__,
        "preloaded": Path(os.environ.get("LD_PRELOAD", "")).name,
        "command": " ".join([f"python benchmarks/{script}", *sys.argv[1:]]),
    }
    console = Console(highlight=False)
    results = {}
    for part in parts:
        if options.only not in (None, part.run.__name__):
            continue
        mx.random.seed(0)
        rows = results[part.run.__name__] = part.run(options.quick)
        table = Table(title=part.title, title_justify="left", box=None)
        for key, (heading, _) in part.columns.items():
            table.add_column(heading, justify="right" if isinstance(rows[0][key], int | float) else "left")
        for row in rows:
            table.add_row(*cells(part, row))
        console.print(table, "")
        if options.json:  # after each part, so that what was measured outlives a later part's failure
            options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
