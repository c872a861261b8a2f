"""The tables that the README and pages of docs/ have of committed results; results_page.py puts them there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from comparison.workloads import WORKLOADS

from mlx_paged.tools.report import Row

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "speculation.md", ROOT / "docs" / "quantised_cache.md")
# Results that the README's table is of -> the model's name. Of the workloads: which cases it shows.
COMPARED = {
    "workloads-smollm2-linux-cpu.json": "SmolLM2",
    "workloads-smollm2-sharing-linux-cpu.json": "SmolLM2",
    "workloads-smollm2-long-linux-cpu.json": "SmolLM2",
    "workloads-gemma3-long-linux-cpu.json": "Gemma 3",
}
QUANTISED = {
    "smollm2": "SmolLM2-135M-Instruct, heads of 64",
    "gemma3": "Gemma 3 270M, heads of 256, windows of 512",
}
SHOWN = {"W1": "", "W2": "", "W4": r"^\d\d |^\d\d\d", "W5": "4 samples", "W6": ""}


def fill(page: str) -> str:
    """Put each table where a page has its place."""
    return re.sub(
        r"(<!-- table (\w+), by python benchmarks/results_page.py -->\n).*?(?=<!-- end -->)",
        lambda found: f"{found[1]}{TABLES[found[2]]()}\n",
        page,
        flags=re.DOTALL,
    )


def peers() -> str:
    """Return, of each case shown, this engine's best way to serve it beside its peers', by CPU time."""
    heads = ["mlx-lm, tokens per CPU second", "llama.cpp", "mlx-paged", "of mlx-lm's"]
    lines = [_table_head("", [*heads, "mlx-lm, MB of K and V", "llama.cpp", "mlx-paged"])]
    for file, name in COMPARED.items():
        for workload, rows in _results(file).items():
            about = WORKLOADS[workload].about.split(",")[0]
            for case in dict.fromkeys(row["case"] for row in rows if re.search(SHOWN.get(workload, "$."), row["case"])):
                by_system = {row["system"]: row for row in rows if row["case"] == case}
                lines += _rows_of_case(f"{name}, {about}: {case}", by_system)
    return "\n".join(lines)


def _rows_of_case(label: str, by_system: dict[str, Row]) -> Iterator[str]:
    """Yield the row of a case, and another one if mlx-lm has a second way to serve it."""
    (ours,) = [row for name, row in by_system.items() if re.fullmatch(r"mlx-paged(, n=\d|, blocks in order)?", name)]
    llama_cpp = by_system["llama.cpp"]
    for system, theirs in by_system.items():
        if system.startswith("mlx-lm"):
            cells = [label + (", and its prompt cache" if "prompt cache" in system else "")]
            speeds = [row["output_tokens"] / row["cpu_seconds"] for row in (theirs, llama_cpp, ours)]
            cells += [f"{speed:,.{1 if speed >= 10 else 2}f}" for speed in speeds]
            cells += [f"{ours['cpu_speedup'] / theirs['cpu_speedup']:.2f}x"]
            cells += [f"{row['kv_peak_mb']:,.0f}" for row in (theirs, llama_cpp, ours)]
            yield f"| {' | '.join(cells)} |"


def lookup() -> str:
    """Return what drafts that are looked up save of a model's decoding."""
    lines = [
        _table_head("task", ["at once", "where they pay", "always", "right, where they pay", "steps, where they pay"])
    ]
    for (task, batch), ways in by_task(_results("speculation-smollm2-linux-cpu.json")["drafts"]).items():
        ratios = (f"{ways[name]['ratio']:.2f}" for name in ("where they pay", "always"))
        lines.append(f"| {task} | {batch} | {' | '.join([*ratios, *_counts(ways, 'where they pay')])} |")
    return "\n".join(lines)


def second_model() -> str:
    """Return what a draft model saves of a deeper model's decoding, beside lookups and mlx-lm's way."""
    names = ("where they pay", "a model's, where they pay", "a model's, always", "mlx-lm, a model's")
    heads = ["at once", "lookups, where they pay", "a model's, where they pay", "a model's, always", "mlx-lm's"]
    lines = [_table_head("task", [*heads, "right, a model's, where they pay", "steps"])]
    for (task, batch), ways in by_task(_results("speculation-deeper-linux-cpu.json")["drafts"]).items():
        ratios = (f"{ways[name]['ratio']:.2f}" if name in ways else "" for name in names)
        lines.append(f"| {task} | {batch} | {' | '.join([*ratios, *_counts(ways, names[1])])} |")
    return "\n".join(lines)


def quantised() -> str:
    """Return what quantised K and V do to predictions of two models."""
    lines = [_table_head("", ["K and V", "perplexity, ratio", "KL divergence, nats", "equal greedy tokens"])]
    for name, about in QUANTISED.items():
        for row in _results(f"quantised-cache-{name}-linux-cpu.json")["quality"][1:]:  # the first is plain
            cells = [
                f"`{row['kv_cache_dtype']}`",
                f"{row['ratio']:.4f}",
                f"{row['kl']:.4f}",
                f"{row['equal_greedy']:.1%}",
            ]
            lines.append(f"| {' | '.join([about, *cells])} |")
    return "\n".join(lines)


def by_task(rows: Iterable[Row]) -> dict[tuple[str, int], dict[str, Row]]:
    """Return the rows of each task and number of requests at once, by how they were run."""
    tasks: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        tasks.setdefault((row["task"], row["batch"]), {})[row["drafts"]] = row
    return tasks


def _counts(ways: dict[str, Row], name: str) -> list[str]:
    way = ways[name]
    return [f"{way['right']} of {way['verified']}", f"{way['steps']} of {ways['none']['steps']}"]


def _table_head(first: str, others: list[str]) -> str:
    return f"| {' | '.join([first, *others])} |\n|---|{'---:|' * len(others)}"


def _results(file: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / file).read_text())["results"]
    return results


TABLES = {"peers": peers, "lookup": lookup, "second_model": second_model, "quantised": quantised}
