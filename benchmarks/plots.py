"""Pictures for the docs, as SVG files: what the benchmarks have measured, and what caches take by arithmetic.

    python benchmarks/plots.py [RESULTS] [IMAGES]       by default benchmarks/results and docs/images

Of each workloads-, concurrency-, mixed-load- and growth-MACHINE.json there is in the first folder: waste by system,
throughput by concurrency, memory over time, memory beside mlx-lm's, and how a step's work grows; a title names the
machine. reserved_and_used.svg is arithmetic, the same everywhere, by the rules of `mlx-paged inspect`. Needs the extra
`plots`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError:
    sys.exit("benchmarks/plots.py needs matplotlib: pip install -e '.[plots]'")

from mlx_paged.cache.layer_spec import LayerSpec
from mlx_paged.tools.cache_cost import LayerGroup, compare, typical_lengths

Row = dict[str, Any]

ROOT = Path(__file__).parent.parent
# Okabe and Ito's colours, which people with any kind of colour vision tell apart.
ORANGE, BLUE, GREEN, GREY = "#e69f00", "#56b4e9", "#009e73", "#9aa4b1"
PANEL, INK = "#191e25", "#e8e8e8"  # a ground of its own, so that a page may be light or dark
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mlx-paged",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"],  # the first comes with matplotlib: one layout everywhere
    "font.size": 11,
    "figure.facecolor": PANEL,
    "figure.constrained_layout.use": True,
    "axes.facecolor": PANEL,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#3a434f",
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "path.simplify": False,
}


def waste(axes: Axes, rows: list[Row]) -> str:
    """Rows of W3: how much of the memory that requests take holds no token, by system."""
    rows = [row for row in rows if row["kv_waste"] is not None]
    names = [row["system"] for row in rows][::-1]
    shares = [100 * row["kv_waste"] for row in rows][::-1]
    colors = [BLUE if name == "mlx-paged" else ORANGE for name in names]
    bars = axes.barh(names, shares, color=colors, height=0.6)
    axes.bar_label(bars, [f"{share:.1f}%" for share in shares], padding=4)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the memory taken for K and V that holds no token, %")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    return "Waste: memory that the requests of W3 take and do not use"


def throughput(axes: Axes, rows: list[Row]) -> str:
    """Rows of concurrency.py: tokens per second of each system, by the requests that it serves at once."""
    styles = {"mlx-paged": (BLUE, "o", "-"), "mlx-lm": (ORANGE, "s", "--")}
    for system, (color, marker, line) in styles.items():
        own = [row for row in rows if row["system"] == system]
        counts, speeds = [row["most"] for row in own], [row["tokens_per_s"] for row in own]
        axes.plot(counts, speeds, color=color, marker=marker, linestyle=line, label=system, gid=f"line-{system}")
    counts = sorted({row["most"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("requests at once")
    axes.set_ylabel("output tokens per second")
    axes.legend()
    return "Throughput by concurrency: 32 requests, so many at a time"


def memory_over_time(axes: Axes, rows: list[Row]) -> str:
    """Rows of concurrency.py: what the running requests use, and what different ways to hold them take."""
    steps = [row["step"] for row in rows]
    series = {
        "reserved": (f"{rows[0]['reserved'] // rows[0]['requests']:,} tokens reserved for each", ORANGE, ":"),
        "padded": ("padded to the longest", GREEN, "--"),
        "blocks": ("blocks", BLUE, "-"),
    }
    for key, (label, color, line) in series.items():
        axes.plot(steps, [row[key] for row in rows], color=color, linestyle=line, label=label, gid=f"line-{key}")
    used = [row["used"] for row in rows]
    axes.fill_between(steps, used, color=BLUE, alpha=0.35, linewidth=0, label="of them in use")
    axes.axhline(rows[0]["pool"], color=GREY, linewidth=1)
    axes.annotate(f"the pool: {rows[0]['pool']:,}", (steps[-1], rows[0]["pool"]), ha="right", va="bottom")
    axes.set_xlim(0, steps[-1])
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("step")
    axes.set_ylabel("room for K and V, tokens")
    axes.legend()
    return "What the requests of W3 take while they are served"


def mixed_load(axes: Axes, rows: list[Row]) -> str:
    """Rows of mixed_load.py: what each system holds, minute by minute, and how much of it is of requests that run."""
    for system, color in (("mlx-lm", ORANGE), ("mlx-paged", BLUE)):
        own = [row for row in rows if row["system"] == system]
        minutes, running = [row["minute"] for row in own], [row["running_mb"] for row in own]
        label = f"{system}, {own[-1]['answered']:,} requests answered"
        axes.plot(minutes, [row["held_mb"] for row in own], color=color, label=label, gid=f"line-{system}")
        axes.fill_between(minutes, running, color=color, alpha=0.35, linewidth=0)
    axes.set_xlim(0, max(row["minute"] for row in rows))
    axes.set_ylim(0, 1.25 * max(row["held_mb"] for row in rows))  # the legend's room
    axes.set_xlabel("minutes; filled: the part of requests that run")
    axes.set_ylabel("held beside the weights, MB")
    axes.legend()
    return "Conversations, questions and documents as they come, to both at once"


def growth(axes: Axes, results: dict[str, list[Row]]) -> str:
    """All parts of growth.py: what the engine's own work in a step takes, by how much there is of one thing."""
    styles = {"sequences": BLUE, "context": ORANGE, "pool": GREEN, "prefixes": GREY, "queue": "#cc79a7"}
    labels = {"sequences": "sequences that decode", "context": "tokens of context", "pool": "blocks of the pool"}
    labels |= {"prefixes": "cached prefixes", "queue": "requests that wait"}
    for (part, color), marker in zip(styles.items(), "os^Dv", strict=True):
        if (rows := results.get(part)) is None:
            continue
        sizes = [next(iter(row.values())) for row in rows]
        times = [row["host_us"] / 1000 for row in rows]
        axes.plot(sizes, times, color=color, marker=marker, label=labels[part], gid=f"line-{part}")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("how many there are")
    axes.set_ylabel("own work in a step, ms of CPU time")
    axes.legend(loc="lower left")
    return "How the engine's own work in a step grows"


Plot = Callable[[Axes, Any], str]
PLOTS: dict[
    str, list[tuple[str | None, str, Plot]]
] = {  # file -> of its parts, None being all: picture, how it is drawn
    "workloads": [("W3", "waste", waste)],
    "concurrency": [
        ("throughput", "throughput", throughput),
        ("memory_over_time", "memory-over-time", memory_over_time),
    ],
    "mixed-load": [("mixed_load", "mixed-load", mixed_load)],
    "growth": [(None, "growth", growth)],
}


def machine_of(content: Row) -> str:
    """Name the machine of a file of results in a few words."""
    machine = content["machine"]
    kind = "CPU" if "cpu" in machine["device"] else "GPU"
    return f"{machine['platform']}, {machine['cpu_count']} cores, MLX {machine['mlx']} on the {kind}"


def draw(plot: Plot, rows: Any, machine: str, path: Path) -> None:
    """Write one picture; the same rows give the same bytes with one version of matplotlib."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.6 if plot is waste else 3.6))  # inches
        axes = figure.subplots()
        axes.set_title(f"{plot(axes, rows)}\n{machine}")
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": "benchmarks/plots.py"})


# -- what eight requests take and use, held in three ways ---------------------------------------------------------

CONTEXT, BLOCK_SIZE, NUM_REQUESTS = 2048, 16, 8
ONE_BYTE = LayerGroup(1, LayerSpec(num_kv_heads=1, key_dim=1, value_dim=0, dtype=mx.uint8), window=None)  # per token
ROW, STEP, TOP, COLUMN, LEFT = 11, 15, 46, 272, 20  # pixels; a column for each way, a step from row to row
PER_TOKEN = 240 / CONTEXT  # pixels
TITLES = {
    "reserved": f"{CONTEXT:,} tokens reserved for each",
    "padded": "padded, as in mlx-lm's batch",
    "blocks": f"blocks of {BLOCK_SIZE}",
}


def reserved_and_used() -> str:
    """Draw a row per request, as wide as the tokens that it takes room for; the filled part holds its tokens."""

    def row_of(x: int, y: int, num_tokens: int, style: str) -> str:
        return f'<rect x="{x}" y="{y}" width="{num_tokens * PER_TOKEN:.2f}" height="{ROW}" {style}/>'

    def text(x: int, y: int, words: str) -> str:
        return f'<text x="{x}" y="{y}">{words}</text>'

    lengths = typical_lengths(NUM_REQUESTS, CONTEXT)
    foot = TOP + NUM_REQUESTS * STEP + 16
    shapes = []
    for number, way in enumerate(compare([ONE_BYTE], lengths, CONTEXT, BLOCK_SIZE)):
        x = LEFT + number * COLUMN
        shapes.append(text(x, TOP - 18, TITLES[way.name]))
        for row, length in enumerate(lengths):
            # Blocks are a request's own; a row that is reserved or padded is like all others.
            taken = -(-length // BLOCK_SIZE) * BLOCK_SIZE if way.name == "blocks" else way.taken // NUM_REQUESTS
            y = TOP + row * STEP
            shapes.append(row_of(x, y, taken, f'fill="{ORANGE}" fill-opacity="0.25" stroke="{ORANGE}"'))
            shapes.append(row_of(x, y, length, f'fill="{BLUE}"'))
        shapes.append(text(x, foot, f"room for {way.taken:,} tokens"))
        shapes.append(text(x, foot + 18, f"{way.needed:,} in use, {way.waste:.1%} empty"))
    font = 'font-size="13" font-family="ui-sans-serif, system-ui, Helvetica, Arial, sans-serif"'
    size = f"0 0 {LEFT + 3 * COLUMN} {foot + 36}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" fill="{INK}" {font}>'
    ground = f'<rect width="100%" height="100%" rx="10" fill="{PANEL}"/>'
    return "\n".join([head, ground, *shapes, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", nargs="?", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("images", nargs="?", type=Path, default=ROOT / "docs" / "images")
    folders = parser.parse_args()
    picture = folders.images / "reserved_and_used.svg"
    picture.write_text(reserved_and_used(), encoding="utf-8")
    print(picture)
    for source, plots in PLOTS.items():
        for file in sorted(folders.results.glob(f"{source}-*.json")):
            content = json.loads(file.read_text())
            for part, picture, plot in plots:
                if part is None or part in content["results"]:
                    path = folders.images / f"{picture}-{file.stem.removeprefix(f'{source}-')}.svg"
                    shown = content["results"] if part is None else content["results"][part]
                    draw(plot, shown, machine_of(content), path)
                    print(path)


if __name__ == "__main__":
    main()
