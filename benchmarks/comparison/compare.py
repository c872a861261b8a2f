"""Comparisons: the systems of a case serve the same requests in turn, and the medians of what that took."""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from comparison.llama_cpp import LlamaCppSystem
from comparison.systems import Memory, MlxLmSystem, PagedSystem, Run
from comparison.workloads import Case, MlxLm, Paged, System, Task
from mlx_paged.errors import ModelError
from mlx_paged.models.loading import LoadedModel
from mlx_paged.tools.report import Columns, Row

SystemUnderTest = PagedSystem | MlxLmSystem | LlamaCppSystem

COLUMNS: Columns = {
    "case": ("case", ""),
    "system": ("system", ""),
    "peak_concurrency": ("at once", ",d"),
    "tokens_per_s": ("tokens/s", ",.1f"),
    "speedup": ("speedup", ".2f"),
    "cpu_speedup": ("by CPU time", ".2f"),
    "first_token_p50_ms": ("first token p50, ms", ",.0f"),
    "first_token_p95_ms": ("p95", ",.0f"),
    "per_token_p50_ms": ("per token p50, ms", ",.1f"),
    "per_token_p95_ms": ("p95", ",.1f"),
    "peak_mb": ("peak MB", ",.1f"),
    "kv_peak_mb": ("of KV", ",.1f"),
    "kv_waste": ("waste", ".1%"),
    "preemptions": ("preemptions", ",.0f"),
    "host_ms_per_step": ("host ms/step", ".2f"),
}


def compare(
    case: Case,
    loaded: LoadedModel,
    repetitions: int,
    text: Sequence[int] | None = None,
    llama_cpp: tuple[str, Path] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Have the systems of a case serve it, taking turns to be first. Returns a row for each: medians of repetitions.

    text: tokens that prompts are passages of; random ones, if not given. llama_cpp: its server's executable and the
    model as a GGUF file, if a system is llama.cpp. Times are in milliseconds, memory is in 10**6 bytes. Raises
    ModelError if the model's context is too short.
    """
    if loaded.max_model_len is not None and case.longest > loaded.max_model_len:
        raise ModelError(
            f"{case.workload} ({case.label}) takes {case.longest:,} tokens of context, and the model was made for "
            f"{loaded.max_model_len:,}"
        )
    text = text or random.Random(0).choices(range(vocab_size_of(loaded)), k=2**16)
    tasks = case.tasks(-1, text)
    systems: list[SystemUnderTest] = []
    memories: list[Memory] = []
    for description in case.systems:
        progress(f"{case.workload} {case.label}: {description.name}, warming up")
        systems.append(make_system(loaded, description, tasks, llama_cpp))
        memories.append(systems[-1].size_pool(tasks))
    runs: list[list[Run]] = [[] for _ in systems]
    for repetition in range(repetitions):
        tasks = case.tasks(repetition, text)
        turns = list(enumerate(systems))
        for number, system in turns if repetition % 2 == 0 else reversed(turns):
            progress(f"{case.workload} {case.label}: {system.system.name}, {repetition + 1} of {repetitions}")
            gc.collect()
            runs[number].append(system.run(tasks))
    return [
        {"workload": case.workload, "case": case.label, "system": system.system.name} | _summary(own, runs[0], memory)
        for system, own, memory in zip(systems, runs, memories, strict=True)
    ]


def make_system(
    loaded: LoadedModel, system: System, tasks: Sequence[Task], llama_cpp: tuple[str, Path] | None
) -> SystemUnderTest:
    """Make what serves the tasks of a case as `system` says."""
    if isinstance(system, Paged):
        return PagedSystem(loaded.model, system, tasks)
    if isinstance(system, MlxLm):
        return MlxLmSystem(loaded.model, system, tasks)
    assert llama_cpp is not None
    return LlamaCppSystem(*llama_cpp, system, tasks)


def _summary(runs: list[Run], of_the_first: list[Run], memory: Memory) -> Row:
    """Sum up a system's runs. speedup, cpu_speedup: tokens per second over the first system's, run by run."""

    def median(value: Callable[[Run], float]) -> float:
        return statistics.median(map(value, runs))

    def quantile(name: str, q: float) -> float:
        return 1e3 * median(lambda run: float(np.quantile([getattr(times, name) for times in run.times], q)))

    def speedup(name: str) -> float:
        def pace(run: Run) -> float:
            return run.num_tokens / float(getattr(run, name))

        return statistics.median(pace(run) / pace(first) for run, first in zip(runs, of_the_first, strict=True))

    return {
        "requests": len(runs[0].times),
        "peak_concurrency": round(median(lambda run: run.peak_concurrency)),
        "output_tokens": round(median(lambda run: run.num_tokens)),
        "tokens_per_s": median(lambda run: run.num_tokens / run.seconds),
        "speedup": speedup("seconds"),
        "cpu_seconds": median(lambda run: run.cpu_seconds),
        "cpu_speedup": speedup("cpu_seconds"),
        "first_token_p50_ms": quantile("time_to_first_token", 0.5),
        "first_token_p95_ms": quantile("time_to_first_token", 0.95),
        "per_token_p50_ms": quantile("time_per_token", 0.5),
        "per_token_p95_ms": quantile("time_per_token", 0.95),
        "peak_mb": median(lambda run: run.peak_bytes) / 1e6,
        "kv_peak_mb": memory.peak_bytes / 1e6,
        "kv_waste": memory.waste,
        "prefix_hits": median(lambda run: run.prefix_hits),
        "preemptions": median(lambda run: run.preemptions),
        "host_ms_per_step": median(lambda run: run.host_ms_per_step),
    }


def vocab_size_of(loaded: LoadedModel) -> int:
    """How many different tokens a prompt may have."""
    from mlx_paged.models.patch import patch_model

    return patch_model(loaded.model).vocab_size
