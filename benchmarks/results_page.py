"""Writes the tables of all committed results to benchmarks/results/README.md, and those of some into other pages.

python benchmarks/results_page.py
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import page_tables

from mlx_paged.tools.report import markdown

FOLDER = Path(__file__).parent / "results"
# Results -> the script that wrote them, what they are, and parts that are not shown.
FILES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "workloads-smollm2-linux-cpu.json": ("workloads", "SmolLM2-135M-Instruct against peers", ()),
    "workloads-smollm2-sharing-linux-cpu.json": ("workloads", "SmolLM2-135M-Instruct, shared prompts", ()),
    "workloads-smollm2-long-linux-cpu.json": ("workloads", "SmolLM2-135M-Instruct, long contexts", ()),
    "workloads-gemma3-long-linux-cpu.json": ("workloads", "Gemma 3 270M, long contexts", ()),
    "workloads-smollm2-room-linux-cpu.json": ("workloads", "SmolLM2-135M-Instruct, pools and blocks", ()),
    "concurrency-linux-cpu.json": ("concurrency", "Throughput by concurrency", ("memory_over_time",)),  # is drawn
    "mixed-load-linux-cpu.json": ("mixed_load", "A long mixed load", ("mixed_load",)),  # is drawn
    "kept-prompts-linux-cpu.json": ("mixed_load", "A mixed load, mlx-lm's kept prompts computed", ("mixed_load",)),
    "fair-steps-linux-cpu.json": ("fair_steps", "A stream beside a long prompt", ()),
    "hybrids-linux-cpu.json": ("hybrids", "Models whose layers keep states", ()),
    "quantised-cache-smollm2-linux-cpu.json": ("quantised_cache", "A quantised cache of SmolLM2-135M-Instruct", ()),
    "quantised-cache-gemma3-linux-cpu.json": ("quantised_cache", "A quantised cache of Gemma 3 270M", ()),
    "quantised-cache-smollm2-spaces-linux-cpu.json": ("quantised_cache", "The same of SmolLM2, with spaces", ()),
    "quantised-cache-gemma3-spaces-linux-cpu.json": ("quantised_cache", "The same of Gemma 3, with spaces", ()),
    "quantised-cache-speed-linux-cpu.json": ("quantised_cache", "What a quantised cache takes", ()),
    "parallel-linux-cpu.json": ("parallel", "What ranks tell each other", ()),
    "parallel-smollm2-linux-cpu.json": ("parallel", "What ranks hold of SmolLM2-135M-Instruct", ()),
    "speculation-smollm2-linux-cpu.json": ("speculation", "Drafts of SmolLM2-135M-Instruct", ()),
    "speculation-deeper-linux-cpu.json": ("speculation", "Drafts by a model a quarter as deep", ()),
    "memory-linux-cpu.json": ("memory", "Blocks", ()),
    "host-overhead-linux-cpu.json": ("host_overhead", "The host's work in a step", ()),
    "growth-linux-cpu.json": ("growth", "How cost grows", ()),
    "accuracy-smollm2-linux-cpu.json": ("accuracy", "Accuracy of SmolLM2-135M-Instruct", ("answers",)),
    "server-smollm2-linux-cpu.json": ("server", "A server of SmolLM2-135M-Instruct", ()),
    "server-scripted-linux-cpu.json": ("server", "A server, of a model that is hardly more than its answers", ()),
    "attention-linux-cpu.json": ("attention", "Attention on a CPU", ()),
    "kernel-traffic.json": ("kernel_traffic", "What Metal kernels ask of memory, counted by the simulator", ()),
    "command-buffers.json": ("command_buffers", "Command buffers of a step, by MLX's rule", ()),
    "cuda-registers.json": ("cuda_registers", "Registers of CUDA kernels, as NVIDIA's compiler allots them", ()),
}
HEAD = """# Results

The tables of the files in this folder, written by `python benchmarks/results_page.py`.
[docs/benchmarks.md](../../docs/benchmarks.md) says what is claimed of them. Nothing was measured on a Mac or on an
NVIDIA card. Throughput by concurrency was timed with the engine of commit 3b85ee2, which had more tricks for MLX's CPU
build than today's.
"""


def section(file: str) -> str:
    """Return the heading, the machine and the tables of a file of results."""
    script, title, hidden = FILES[file]
    content = json.loads((FOLDER / file).read_text())
    machine = content["machine"]
    about = ", ".join(
        f"{key} {machine[key]}"
        for key in ("platform", "device", "python", "mlx", "preloaded", "load_at_start")
        if machine.get(key)
    )
    parts = [part for part in import_module(script).PARTS if part.run.__name__ in content["results"]]
    tables = [
        f"{part.title}:\n\n{markdown(part.columns, content['results'][part.run.__name__])}"
        for part in parts
        if part.run.__name__ not in hidden
    ]
    return "\n\n".join([f"## {title}", f"`{file}`, by `{machine['command']}`; {about}.", *tables])


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *(section(file) + "\n" for file in FILES)])


if __name__ == "__main__":
    (FOLDER / "README.md").write_text(page())
    for file in page_tables.PAGES:
        file.write_text(page_tables.fill(file.read_text()))
