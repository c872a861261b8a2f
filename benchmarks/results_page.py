"""Writes benchmarks/results/README.md, the tables of all committed results: python benchmarks/results_page.py.

`--print` prints the page and writes nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent
PAGE = BENCHMARKS / "results" / "README.md"
# Results -> the script that wrote them, what they are, and parts that are not shown.
FILES = {
    "workloads-linux-cpu.json": ("workloads.py", "Against mlx-lm", ()),
    "concurrency-linux-cpu.json": ("concurrency.py", "Throughput by concurrency", ("memory_over_time",)),  # is drawn
    "memory-linux-cpu.json": ("memory.py", "Blocks", ()),
    "host-overhead-linux-cpu.json": ("host_overhead.py", "The host's work in a step", ()),
    "attention-linux-cpu.json": ("attention.py", "Attention on a CPU", ()),
    "kernel-traffic.json": ("kernel_traffic.py", "What kernels ask of memory, counted by the simulator", ()),
    "cuda-registers.json": ("cuda_registers.py", "Registers of CUDA kernels, as compiled", ()),
}
HEAD = """# Results

Made by `python benchmarks/results_page.py` of the files in this folder: do not edit. [What they mean](../../docs/benchmarks.md).
Nothing here was measured on a Mac or on an NVIDIA card. Everything that was timed was timed before commit 3b85ee2's tricks for
MLX's CPU build were taken out of the engine.
"""


def section(file: str) -> str:
    """Return the heading, the machine and the tables of a file of results."""
    script, title, hidden = FILES[file]
    content = json.loads((BENCHMARKS / "results" / file).read_text())
    machine = content["machine"]
    facts = {key: machine[key] for key in ("platform", "device", "cpu_count", "python", "mlx", "preloaded") if key in machine}
    about = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items() if value)
    command = [sys.executable, str(BENCHMARKS / script), "--markdown", str(BENCHMARKS / "results" / file)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    texts = printed.strip().split("\n\n")
    tables = zip(content["results"], texts[::2], texts[1::2], strict=True)
    shown = [f"{heading}\n\n{table}" for part, heading, table in tables if part not in hidden]
    return "\n\n".join([f"## {title}", f"`{file}`: `{machine['command']}`; {about}.", *shown])


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *(section(file) + "\n" for file in FILES)])


if __name__ == "__main__":
    if "--print" in sys.argv:
        print(page(), end="")
    else:
        PAGE.write_text(page())
