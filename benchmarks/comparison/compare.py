"""Comparisons: the systems of a case serve the same requests in turn, and the medians of what that took."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable

import numpy as np

from comparison.systems import Contender, Memory, Run, make_contender
from comparison.workloads import Case
from mlx_paged.models.loading import LoadedModel
from mlx_paged.tools.report import Columns, Row

COLUMNS: Columns = {
    "case": ("case", ""),
    "system": ("system", ""),
    "at_once": ("at once", ",d"),
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
    case: Case, loaded: LoadedModel, repetitions: int, progress: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """A row for each system of a case: medians over repetitions, in which the systems take turns to be first.

    Times are in milliseconds, memory is in 10**6 bytes. Raises ValueError if the model's context is too short.
    """
    if loaded.max_model_len is not None and case.longest > loaded.max_model_len:
        raise ValueError(
            f"{case.workload} ({case.label}) takes {case.longest:,} tokens of context, and the model was made for "
            f"{loaded.max_model_len:,}"
        )
    vocab_size = vocab_size_of(loaded)
    tasks = case.tasks(-1, vocab_size)
    contenders: list[Contender] = []
    memories: list[Memory] = []
    for system in case.systems:
        progress(f"{case.workload} {case.label}: {system.name}, warming up")
        contender = make_contender(loaded.model, system, tasks)
        contenders.append(contender)
        memories.append(contender.fit(tasks))
    runs: list[list[Run]] = [[] for _ in contenders]
    for repetition in range(repetitions):
        tasks = case.tasks(repetition, vocab_size)
        turns = list(enumerate(contenders))
        for number, contender in turns if repetition % 2 == 0 else reversed(turns):
            progress(f"{case.workload} {case.label}: {contender.system.name}, {repetition + 1} of {repetitions}")
            gc.collect()
            runs[number].append(contender.run(tasks))
    return [
        {"workload": case.workload, "case": case.label, "system": contender.system.name}
        | _summary(own, runs[0], memory)
        for contender, own, memory in zip(contenders, runs, memories, strict=True)
    ]


def _summary(runs: list[Run], of_the_first: list[Run], memory: Memory) -> Row:
    """What a system's runs took. speedup, cpu_speedup: tokens per second over the first system's, run by run."""

    def median(value: Callable[[Run], float]) -> float:
        return statistics.median(map(value, runs))

    def quantile(name: str, q: float) -> float:
        return 1e3 * median(lambda run: float(np.quantile([getattr(life, name) for life in run.lives], q)))

    def speedup(name: str) -> float:
        def pace(run: Run) -> float:
            return run.num_tokens / float(getattr(run, name))

        return statistics.median(pace(run) / pace(first) for run, first in zip(runs, of_the_first, strict=True))

    return {
        "requests": len(runs[0].lives),
        "at_once": round(median(lambda run: run.most_at_once)),
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
