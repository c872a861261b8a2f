"""Models that are served on a GPU, for on_a_mac.py and on_a_gpu.py: writes, buffers, uploads, memory and whole runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import mlx.core as mx
import numpy as np
from comparison.compare import COLUMNS, compare
from comparison.systems import Run, measured
from comparison.workloads import Case, Length, MlxLm, System, mixed_lengths, paged
from gpu_steps import seconds
from report import Part, Row

from mlx_paged import LLM, SamplingParams
from mlx_paged.runner.trial_writes import WRITE_VARIABLE, WRITERS
from mlx_paged.tools.random_models import make_random_model
from mlx_paged.tools.speed import COLUMNS as SPEED

ROOT = Path(__file__).parents[1]
QUICK = "qwen2-tiny"  # the model of quick runs


def run_python(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process of its own that finds this project and its tests; variables: of its environment."""
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path} | variables
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


def shapes(quick: bool) -> list[str]:
    """Of the random models that are served."""
    return [QUICK] if quick else ["qwen2-0.5b", "llama-8b"]


# -- writes ---------------------------------------------------------------------------------------------------


def decode_run(llm: LLM, batch: int, num_tokens: int) -> Run:
    """So many tokens of each of `batch` sequences."""
    prompts = [[i % 100 + 1, 2, 3] for i in range(batch)]
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)

    def serve() -> Run:
        started = time.perf_counter()
        llm.generate(prompts, params)
        mx.synchronize()
        return Run(time.perf_counter() - started, batch * num_tokens, [])

    serve()
    return measured(serve)


def writes(quick: bool) -> Iterator[Row]:
    """With a pool large enough that a copy of one layer's is seen."""
    model = make_random_model(QUICK if quick else "qwen2-0.5b", "bfloat16").model
    batch, num_tokens, num_blocks = (2, 4, 64) if quick else (8, 128, 1 << 13)
    for name in WRITERS:
        for pipelining in ("off",) if quick else ("auto", "off", "build", "submit"):
            with mock.patch.dict("os.environ", {WRITE_VARIABLE: name}):
                llm = LLM.from_model(model, num_kv_blocks=num_blocks, pipelining=pipelining, prefix_caching=False)
                run = decode_run(llm, batch, num_tokens)
            pool = llm.stats().kv_bytes / len(model.layers) / 2
            yield {
                "writes": name,
                "pipelining": pipelining,
                "submits": "yes" if llm.engine._runner.overlap_is_safe else "no",
                "tokens": run.num_tokens / run.seconds,
                "peak_mb": run.peak_bytes / 1e6,
                "pool_mb": pool / 1e6,
            }
            del llm


# -- submission -----------------------------------------------------------------------------------------------


LIMITS = {
    "MLX's own": {},
    "no elements": {"MLX_MAX_MB_PER_BUFFER": "1000000"},
    "1,000 operations": {"MLX_MAX_OPS_PER_BUFFER": "1000"},
    "1,000 operations, no elements": {"MLX_MAX_OPS_PER_BUFFER": "1000", "MLX_MAX_MB_PER_BUFFER": "1000000"},
}
"""Where MLX ends a command buffer, or a CUDA graph -> variables that say so."""


def submission(quick: bool) -> Iterator[Row]:
    """Each in a process of its own: MLX reads the variables once."""
    options = ["--random-weights", QUICK, "-g", "2", "-b", "1", "-n", "1"]
    if not quick:
        options = ["--random-weights", "qwen2-0.5b", "-g", "128", "-b", "1,8", "-n", "3", "--kv-cache-memory", "20%"]
    for limit, variables in list(LIMITS.items())[: 1 if quick else None]:
        done = run_python("-m", "mlx_paged", "bench", "-p", "0", *options, "-o", "json", **variables)
        if done.returncode:
            raise RuntimeError(done.stderr)
        for row in json.loads(done.stdout)["results"]["speed"]:
            yield {"limit": limit, **row}


# -- uploads --------------------------------------------------------------------------------------------------


def uploads(quick: bool) -> list[Row]:
    """A chain of additions to one array, of one that is on the device and of a new one from the host each time."""
    values = np.arange(64, dtype=np.int32)
    x, there = mx.zeros(64, mx.int32), mx.array(values) + 0
    mx.eval(x, there)
    on_device = seconds(lambda y: y + there, x, quick)
    from_host = seconds(lambda y: y + mx.array(values), x, quick)
    return [
        {"array": "on the device", "microseconds": on_device * 1e6},
        {"array": "new, from the host", "microseconds": from_host * 1e6},
    ]


# -- memory ---------------------------------------------------------------------------------------------------


def active_after(llm: LLM, draw: np.random.Generator, count: int, length: int) -> int:
    """Bytes that are held when so many random prompts of that length have been served."""
    prompts = [draw.integers(0, 1000, length).tolist() for _ in range(count)]
    llm.generate(prompts, SamplingParams(temperature=0.8, max_tokens=8, ignore_eos=True))
    mx.synchronize()
    return mx.get_active_memory()


def memory(quick: bool) -> Iterator[Row]:
    """Of engines without any size given; served are prompts of the largest chunk, and many requests after them."""
    for shape in shapes(quick):
        loaded = make_random_model(shape, "bfloat16")
        sizes = {"num_kv_blocks": 64, "max_num_batched_tokens": 32} if quick else {}
        llm = LLM.from_model(loaded.model, max_model_len=loaded.max_model_len, **sizes)
        plan, draw = llm.engine._runner.plan, np.random.default_rng(0)
        count, length = (2, 20) if quick else (32, 4000)
        mx.reset_peak_memory()
        first = active_after(llm, draw, count, length)
        peak = mx.get_peak_memory()
        later = [active_after(llm, draw, count, length) for _ in range(1 if quick else 3)][-1]
        yield {
            "model": shape,
            "limit": plan.device_bytes / 1e9,
            "weights": plan.weight_bytes / 1e9,
            "kv": plan.kv_bytes / 1e9,
            "reserve": plan.step_bytes / 1e9,
            "taken": (peak - plan.weight_bytes - plan.kv_bytes) / 1e9,
            "growth_mb": (later - first) / 1e6,
        }
        del llm


# -- end to end -----------------------------------------------------------------------------------------------


def end_to_end(quick: bool, models: Sequence[str] | None = None, most: int = 128) -> Iterator[Row]:
    """models: as in `shapes`, unless they are named. most: requests at a time."""
    for shape in shapes(quick) if quick or models is None else models:
        loaded = make_random_model(shape, "bfloat16")
        for at_once in (2,) if quick else [count for count in (32, 8, 128) if count <= most]:
            equal = [Length(20, 3) if quick else Length(128, 128)] * (2 * at_once)
            mixed = mixed_lengths(2 * at_once, 32 if quick else 2)
            systems: list[System] = [MlxLm(concurrency=at_once), paged(max_num_seqs=at_once)]
            for label, lengths in (("equal", equal), ("mixed", mixed))[: 1 if quick else 2]:
                case = Case("on a GPU", f"{label}, {at_once} at once", lengths, systems)
                for row in compare(case, loaded, 1 if quick else 2):
                    yield {"model": shape} | row


# -- tables ------------------------------------------------------------------------------------------------------


WRITES = Part(
    writes,
    "Writes of keys and values, and steps submitted before the one before is over",
    {
        "writes": ("written by", ""),
        "pipelining": ("pipelining", ""),
        "submits": ("submitted early", ""),
        "tokens": ("tokens/s", ",.0f"),
        "peak_mb": ("peak beside the pools, MB", ",.1f"),
        "pool_mb": ("a layer's keys, MB", ",.1f"),
    },
    "Does a kernel that writes, or an early step, save time, and is no pool ever copied?",
    50,
)
SUBMISSION = Part(
    submission,
    "Decoding by where MLX ends a command buffer or graph",
    {"limit": ("limit", ""), **SPEED},
    "What do MLX_MAX_OPS_PER_BUFFER and MLX_MAX_MB_PER_BUFFER change, end to end?",
    60,
)
UPLOADS = Part(
    uploads,
    "An addition to an array",
    {"array": ("with one", ""), "microseconds": ("us", ",.1f")},
    "What does an array cost that the host makes for a step?",
    15,
)
MEMORY = Part(
    memory,
    "Memory by default, GB",
    {
        "model": ("model", ""),
        "limit": ("free at first", ",.2f"),
        "weights": ("weights", ",.2f"),
        "kv": ("KV cache", ",.2f"),
        "reserve": ("reserve", ",.2f"),
        "taken": ("taken of it", ",.2f"),
        "growth_mb": ("growth, MB", ",.2f"),
    },
    "How much of what an engine takes by default is needed, and does that grow?",
    45,
)
END_TO_END = Part(
    end_to_end,
    "End to end",
    {"model": ("model", ""), **COLUMNS},
    "How fast are whole models beside mlx-lm on this device?",
    90,
)
