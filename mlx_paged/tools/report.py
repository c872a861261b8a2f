"""What benchmarks print and write: the machine they ran on, and rows as a table, Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]
Columns = dict[str, tuple[str, str]]  # key in a row -> heading and format

_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")  # what tells a BLAS how many threads to use
FORMATS = ("table", "json", "csv", "md")


def describe_machine(command: str, **details: Any) -> dict[str, Any]:
    """Describe what numbers depend on beside the code. command: repeats them. details: others, such as versions."""
    import mlx.core as mx

    info = {} if mx.default_device() == mx.cpu else mx.device_info()
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "device": str(mx.default_device()),
        **{name: info[name] for name in ("device_name", "architecture") if name in info},
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        **details,
        "mlx": version("mlx"),
        "preloaded": Path(os.environ.get("LD_PRELOAD", "")).name,
        **{name: os.environ[name] for name in _THREADS if name in os.environ},
        "command": command,
    }


def cells(columns: Columns, row: Row) -> list[str]:
    """Format the values of a row that columns show; None, which nobody could tell, as nothing."""
    return ["" if row[key] is None else format(row[key], spec) for key, (_, spec) in columns.items()]


def markdown(columns: Columns, rows: Sequence[Row]) -> str:
    """Write rows as a table in Markdown, numbers to the right."""
    headings = [heading for heading, _ in columns.values()]
    rules = ["---:" if isinstance(rows[0][key], int | float) else "---" for key in columns]
    lines = [headings, rules, *(cells(columns, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def terminal_table(title: str, columns: Columns, rows: Sequence[Row]) -> Table:
    """Make the same table for a terminal."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None)
    for key, (heading, _) in columns.items():
        table.add_column(heading, justify="right" if isinstance(rows[0][key], int | float) else "left")
    for row in rows:
        table.add_row(*cells(columns, row))
    return table


def as_text(table: Table) -> str:
    """Print a table to a string: a row is a line, if need be wider than the terminal, and nothing is cut off."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(highlight=False, markup=False)  # a name may have brackets
    console.width = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def render(
    output: str,
    tables: Mapping[str, tuple[str, Columns]],
    results: Mapping[str, Sequence[Row]],
    machine: dict[str, Any],
) -> str:
    """Write results, part by part, in one of FORMATS. tables: the title and columns of each part.

    JSON has the machine and every value, {"machine": {...}, "results": {part: rows}}; CSV has every value too, the
    parts one after the other, with the heading of the first.
    """
    if output == "json":
        return json.dumps({"machine": machine, "results": results}, indent=1, allow_nan=False) + "\n"
    if output == "csv":
        buffer = io.StringIO()
        rows = [row for part in results.values() for row in part]
        writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return buffer.getvalue()
    if output == "md":
        parts = [f"{title}:\n\n{markdown(columns, results[part])}\n" for part, (title, columns) in tables.items()]
        return "\n".join(parts)
    return "\n".join(
        as_text(terminal_table(title, columns, results[part])) for part, (title, columns) in tables.items()
    )
