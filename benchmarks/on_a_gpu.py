"""Everything that there is to learn about the CUDA kernels on a card, in one command.

    pip install "mlx-paged[cuda,test]"
    python benchmarks/on_a_gpu.py [--quick] [--json FILE] [--only PART]

1. `wrapper`: the text that MLX puts around a kernel, against the one that the tests rebuild (helpers/cuda_text.py)
2. `correctness`: tests of the kernels (MLX_PAGED_LONG_TESTS=1: at every point of their grid) and of the engine, with
   the card in place of the simulator; contexts of 32,768 and 131,072 tokens, and a pool of more than 2^31 elements,
   against float64
3. `decode`: time of a step's attention, and its share of the bandwidth of a copy
4. `prefill`: the same, and its share of the rate of a large matrix product
5. `writes`: new keys and values written by the kernel for it and by MLX's scatter, when a step is submitted before and
   after the one before it is over: tokens per second, and memory beside the pools
6. `submission`: the same model where MLX ends a graph by the size of its inputs, pools among them, and where not
7. `uploads`: what an array costs that the host has made for a step, as those of positions and slots are
8. `memory`: what an engine takes by default, how much of it serving really takes, and whether that grows
9. `end_to_end`: equal and mixed requests, 8, 32 and 128 at a time, beside mlx-lm's own batches

Parts 3 and 4 give medians of repetitions, each of several calls that are evaluated together, one after another. Each
part runs in a process of its own; `--only` with the same `--json` adds one to what is there. TF32 is off: with it MLX
rounds float32 to 10 bits, and no comparison in float32 would hold.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import mlx.core as mx
import mlx_lm
import numpy as np
import report
from attention import dense_attention
from comparison.compare import COLUMNS, compare
from comparison.systems import Run, measured
from comparison.workloads import Case, Length, MlxLm, System, mixed_lengths, paged
from report import Part, Row

from mlx_paged import LLM, SamplingParams
from mlx_paged.attention.backend import AttentionOptions, Backend
from mlx_paged.attention.cuda import CudaBackend
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.attention.paged_attention import attend
from mlx_paged.tools import speed as bench
from mlx_paged.tools.random_models import make_random_model

ROOT = Path(__file__).parents[1]

BLOCK_SIZE = 16
CUDA = CudaBackend()
QUICK = "qwen2-tiny"  # the model of quick runs
EXACT = {"MLX_ENABLE_TF32": "0"}


def seconds(function: Callable[[mx.array], mx.array], x: mx.array, calls: int, repetitions: int = 7) -> float:
    """Of one call. Each call has the result of the one before, or MLX could run several at once."""

    def run() -> None:
        y = x
        for _ in range(calls):
            y = function(y)
        mx.eval(y)
        mx.synchronize()

    run()
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) / calls)
    return statistics.median(times)


class Step(NamedTuple):
    """The arrays of a step's attention."""

    q: mx.array
    k_cache: mx.array
    v_cache: mx.array
    metadata: AttentionMetadata

    def attend(self) -> mx.array:
        return attend(*self, AttentionOptions(self.q.shape[2] ** -0.5), "cuda")

    def attend_with(self, q: mx.array) -> mx.array:
        return self._replace(q=q).attend()


def make_step(
    batch: int, context: int, num_queries: int, heads: tuple[int, int], head_dim: int, dtype: mx.Dtype
) -> Step:
    """`batch` sequences with so many queries and tokens of context each; their blocks lie in random order."""
    rng = np.random.default_rng(0)
    blocks = -(-context // BLOCK_SIZE)
    tables = mx.array(rng.permutation(batch * blocks).reshape(batch, blocks).astype(np.int32))
    caches = [mx.random.normal((batch * blocks, BLOCK_SIZE, heads[1], head_dim)).astype(dtype) for _ in "kv"]
    q = mx.random.normal((batch * num_queries, heads[0], head_dim)).astype(dtype)
    mx.eval(q, *caches, tables)
    starts = np.arange(batch + 1, dtype=np.int32) * num_queries
    return Step(q, *caches, AttentionMetadata(tables, np.full(batch, context, np.int32), starts))


def slots_of(block_ids: mx.array, offsets: mx.array) -> AttentionMetadata:
    """Metadata that tells where new keys and values go, and nothing else."""
    nothing = np.zeros(0, np.int32)
    return AttentionMetadata(mx.array(nothing), nothing, nothing, slot_block_ids=block_ids, slot_offsets=offsets)


def run_python(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process of its own that finds this project and its tests; variables: of its environment."""
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path} | variables
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


def shapes(quick: bool) -> list[str]:
    """Of the random models that are served."""
    return [QUICK] if quick else ["qwen2-0.5b", "llama-8b"]


def name_of(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


# -- 1. the wrapper ----------------------------------------------------------------------------------------------


def wrapper(quick: bool) -> list[Row]:
    sys.path.append(str(ROOT / "tests"))
    cuda_text = importlib.import_module("helpers.cuda_text")
    rebuilt = {
        "paged_decode": cuda_text.record("decode", 4, mx.float16, (64, 64)).text,
        "paged_prefill": cuda_text.record("prefill", 4, mx.float16, (64, 64)).text,
        "paged_merge": cuda_text.record_merge(mx.float16, 64).text,
        "paged_write": cuda_text.record_write(mx.float16, (64, 64)).text,
    }
    real, rows = mx.fast.cuda_kernel, []

    def verbose_kernel(**options: Any) -> Callable[..., Any]:
        kernel = real(**options)
        return lambda **arguments: kernel(**arguments, verbose=True)

    with mock.patch.object(mx.fast, "cuda_kernel", verbose_kernel), tempfile.TemporaryFile() as captured:
        sys.stdout.flush()
        saved = os.dup(1)
        os.dup2(captured.fileno(), 1)
        try:
            decode, prefill = (make_step(1, 9, queries, (4, 1), 64, mx.float16) for queries in (1, 2))
            mx.eval(decode.attend(), prefill.attend())
            merge = CUDA.prepare_merge(mx.zeros((2, 8, 8), mx.float16), 64, mx.zeros(8, mx.int32))
            mx.eval(merge([mx.zeros((4, 8, 64), mx.float16), mx.zeros((4, 8))]))
            pools = [mx.zeros((3, 16, 2, 64), mx.float16) for _ in "kv"]
            metadata = slots_of(mx.arange(3), mx.arange(3))
            mx.eval(CUDA.write(*pools, metadata, *(pool[0, :3] for pool in pools)))
        finally:
            os.dup2(saved, 1)
            os.close(saved)
        captured.seek(0)
        texts = captured.read().decode().split("```")[1::2]
    for name, expected in rebuilt.items():
        text = next(text for text in texts if f"custom_kernel_{name}" in text)
        same = without_names(text) == without_names(expected)
        rows.append({"kernel": name, "same": "yes" if same else "no", "text": text})
    return rows


def without_names(text: str) -> str:
    """Words of the text; the kernel's name, to which MLX appends the template arguments, shortened."""
    return " ".join("NAME(" if word.startswith("custom_kernel_") else word for word in text.replace("(", "( ").split())


# -- 2. correctness ----------------------------------------------------------------------------------------------


TESTS = {
    "kernels": ["attention/test_kernels_decode.py", "attention/test_kernels_prefill.py",
                "attention/test_kernels_shared.py", "attention/test_kernels_engine.py", "attention/test_cuda_write.py"],
    "engine": ["attention/test_paged_attention.py", "system/test_parity.py", "cache/test_kv_cache.py",
               "system/test_pipelining.py", "system/test_memory_flat.py", "engine/test_beams_in_engine.py",
               "cache/test_swap.py", "models/test_demo.py"],
}  # fmt: skip


def run_tests(files: list[str]) -> str:
    """What the tests in these files print."""
    done = run_python(
        "-m", "pytest", "-q", "-ra", "-k", "not metal", *(ROOT / "tests" / file for file in files), **EXACT
    )
    return done.stdout + done.stderr


def correctness(quick: bool) -> list[Row]:
    rows = []
    for what, files in TESTS.items():
        log = run_tests(files)
        rows.append({"what": f"tests: {what}", "result": log.strip().splitlines()[-1], "log": log})
    for dtype, heads, head_dim in ((mx.bfloat16, (32, 8), 128), (mx.float16, (14, 2), 64), (mx.float32, (8, 8), 128)):
        for num_queries, context in ((1, 40), (30, 50)) if quick else ((1, 32768), (1, 131072), (16, 131072)):
            step = make_step(1, context, num_queries, heads, head_dim, dtype)
            what = f"{name_of(dtype)} {heads[0]}/{heads[1]} heads of {head_dim}, {num_queries} of {context:,}"
            rows.append({"what": what, "result": f"relative error {relative_error(step):.1e}", "log": ""})
    step = step_at_the_end_of_a_pool(1 << (16 if quick else 31))
    what = f"a pool of {step.k_cache.size:,} elements, its last blocks"
    rows.append({"what": what, "result": f"relative error {relative_error(step):.1e}", "log": ""})
    return rows


def step_at_the_end_of_a_pool(num_elements: int) -> Step:
    """A decode over the last blocks of a pool with more elements than that; all of their slots are written first."""
    heads, head_dim, num_blocks = (8, 2), 64, 5
    block = BLOCK_SIZE * heads[1] * head_dim
    first = -(-num_elements // block)
    caches = [mx.zeros((first + num_blocks, BLOCK_SIZE, heads[1], head_dim), mx.bfloat16) for _ in "kv"]
    slots = np.arange(num_blocks * BLOCK_SIZE, dtype=np.int32)
    where = mx.array(first + slots // BLOCK_SIZE), mx.array(slots % BLOCK_SIZE)
    new = [mx.random.normal((len(slots), heads[1], head_dim)).astype(mx.bfloat16) for _ in "kv"]
    mx.eval(CUDA.write(*caches, slots_of(*where), *new))
    q = mx.random.normal((1, heads[0], head_dim)).astype(mx.bfloat16)
    tables, context = mx.arange(first, first + num_blocks, dtype=mx.int32)[None], np.array([len(slots)], np.int32)
    return Step(q, *caches, AttentionMetadata(tables, context, np.array([0, 1], np.int32)))


def relative_error(step: Step) -> float:
    """Of the attention of one sequence, against float64."""
    (context,), num_queries = step.metadata.context_lens, step.q.shape[0]
    contents = [cache[step.metadata.block_tables[0]].flatten(0, 1)[: int(context)] for cache in step[1:3]]
    arrays = (step.attend(), step.q, *contents)
    found, *inputs = (np.array(array.astype(mx.float32)).astype(np.float64) for array in arrays)
    expected = dense_attention(*inputs, positions=np.arange(context - num_queries, context))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# -- 3. decode ---------------------------------------------------------------------------------------------------


def copy_bandwidth(quick: bool) -> float:
    """Bytes per second, read and written, of a large copy."""
    source = mx.random.normal((1 << (20 if quick else 28),)).astype(mx.bfloat16)
    mx.eval(source)
    return 2 * source.nbytes / seconds(lambda x: x + 1, source, calls=4)


def decode(quick: bool) -> list[Row]:
    copied, rows = copy_bandwidth(quick), []
    settings = [(32, 4096, (32, 8), 128), (32, 16384, (32, 8), 128), (1, 32768, (32, 8), 128), (8, 4096, (64, 8), 128),
                (32, 4096, (14, 2), 64), (32, 4096, (8, 8), 128)]  # fmt: skip
    for batch, context, heads, head_dim in [(2, 300, (8, 2), 64)] if quick else settings:
        for dtype in (mx.bfloat16, mx.float32):
            if dtype == mx.float32 and context > 4096:
                continue
            step = make_step(batch, context, 1, heads, head_dim, dtype)
            took = seconds(step.attend_with, step.q, calls=1 if quick else 20)
            bandwidth = 2 * batch * context * heads[1] * head_dim * dtype.size / took
            rows.append(
                {
                    "batch": batch,
                    "context": context,
                    "heads": f"{heads[0]}/{heads[1]} x {head_dim}",
                    "dtype": name_of(dtype),
                    "microseconds": took * 1e6,
                    "gigabytes": bandwidth / 1e9,
                    "share": bandwidth / copied,
                }
            )
    return rows


# -- 4. prefill --------------------------------------------------------------------------------------------------


def matrix_rate(quick: bool, dtype: mx.Dtype) -> float:
    """Operations per second of a product of large square matrices."""
    size = 256 if quick else 8192
    a, b = (mx.random.normal((size, size), scale=size**-0.5).astype(dtype) for _ in "ab")
    mx.eval(a, b)
    return 2 * size**3 / seconds(lambda x: x @ b, a, calls=4)


def prefill(quick: bool) -> list[Row]:
    rate, rows = matrix_rate(quick, mx.bfloat16), []
    settings = [(1, 8192, 8192, (32, 8), 128), (4, 2048, 2048, (32, 8), 128), (1, 2048, 32768, (32, 8), 128),
                (1, 8192, 8192, (32, 8), 64), (1, 8192, 8192, (16, 8), 256), (32, 4, 4096, (32, 8), 128)]  # fmt: skip
    for batch, num_queries, context, heads, head_dim in [(2, 20, 50, (8, 2), 64)] if quick else settings:
        step = make_step(batch, context, num_queries, heads, head_dim, mx.bfloat16)
        took = seconds(step.attend_with, step.q, calls=1 if quick else 5)
        visible = batch * num_queries * (context - (num_queries - 1) / 2)
        operations = 4 * visible * heads[0] * head_dim
        rows.append(
            {
                "batch": batch,
                "queries": num_queries,
                "context": context,
                "heads": f"{heads[0]}/{heads[1]} x {head_dim}",
                "microseconds": took * 1e6,
                "teraflops": operations / took / 1e12,
                "share": operations / took / rate,
            }
        )
    return rows


# -- 5. writes ---------------------------------------------------------------------------------------------------


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


def writes(quick: bool) -> list[Row]:
    """With a pool large enough that a copy of one layer's is seen."""
    model, rows = make_random_model(QUICK if quick else "qwen2-0.5b", "bfloat16").model, []
    batch, num_tokens, num_blocks = (2, 4, 64) if quick else (32, 256, 1 << 15)
    for name, write in (("kernel", CudaBackend.write), ("scatter", Backend.write)):
        for pipelining in ("off",) if quick else ("auto", "off", "build", "submit"):
            with mock.patch.object(CudaBackend, "write", write):
                llm = LLM.from_model(model, num_kv_blocks=num_blocks, pipelining=pipelining, prefix_caching=False)
                run = decode_run(llm, batch, num_tokens)
            pool = llm.stats().kv_bytes / len(model.layers) / 2
            rows.append(
                {
                    "writes": name,
                    "pipelining": pipelining,
                    "submits": "yes" if llm.engine._runner.overlap_is_safe else "no",
                    "tokens": run.num_tokens / run.seconds,
                    "peak_mb": run.peak_bytes / 1e6,
                    "pool_mb": pool / 1e6,
                }
            )
            del llm
    return rows


# -- 6. submission -----------------------------------------------------------------------------------------------


def submission(quick: bool) -> list[Row]:
    """Each in a process of its own: MLX reads the variable once."""
    rows = []
    options = ["--random-weights", QUICK, "-g", "2", "-b", "1", "-n", "1"]
    if not quick:
        options = ["--random-weights", "qwen2-0.5b", "-g", "256", "-b", "1,32", "--kv-cache-memory", "40%"]
    for limit, variables in (("MLX's own", {}), ("1,000,000", {"MLX_MAX_MB_PER_BUFFER": "1000000"})):
        done = run_python("-m", "mlx_paged", "bench", "-p", "0", *options, "-o", "json", **variables)
        if done.returncode:
            raise RuntimeError(done.stderr)
        rows += [{"limit": limit, **row} for row in json.loads(done.stdout)["results"]["speed"]]
    return rows


# -- 7. uploads --------------------------------------------------------------------------------------------------


def uploads(quick: bool) -> list[Row]:
    """A chain of additions to one array, of one that is on the device and of a new one from the host each time."""
    calls, values = (4 if quick else 200), np.arange(64, dtype=np.int32)
    x, there = mx.zeros(64, mx.int32), mx.array(values) + 0
    mx.eval(x, there)
    on_device = seconds(lambda y: y + there, x, calls)
    from_host = seconds(lambda y: y + mx.array(values), x, calls)
    return [
        {"array": "on the device", "microseconds": on_device * 1e6},
        {"array": "new, from the host", "microseconds": from_host * 1e6},
    ]


# -- 8. memory ---------------------------------------------------------------------------------------------------


def active_after(llm: LLM, draw: np.random.Generator, count: int, length: int) -> int:
    """Bytes that are held when so many random prompts of that length have been served."""
    prompts = [draw.integers(0, 1000, length).tolist() for _ in range(count)]
    llm.generate(prompts, SamplingParams(temperature=0.8, max_tokens=8, ignore_eos=True))
    mx.synchronize()
    return mx.get_active_memory()


def memory(quick: bool) -> list[Row]:
    """Of engines without any size given; served are prompts of the largest chunk, and many requests after them."""
    rows = []
    for shape in shapes(quick):
        loaded = make_random_model(shape, "bfloat16")
        sizes = {"num_kv_blocks": 64, "max_num_batched_tokens": 32} if quick else {}
        llm = LLM.from_model(loaded.model, max_model_len=loaded.max_model_len, **sizes)
        plan, draw = llm.engine._runner.plan, np.random.default_rng(0)
        count, length = (2, 20) if quick else (64, 4000)
        mx.reset_peak_memory()
        first = active_after(llm, draw, count, length)
        peak = mx.get_peak_memory()
        later = [active_after(llm, draw, count, length) for _ in range(1 if quick else 3)][-1]
        rows.append(
            {
                "model": shape,
                "limit": plan.device_bytes / 1e9,
                "weights": plan.weight_bytes / 1e9,
                "kv": plan.kv_bytes / 1e9,
                "reserve": plan.step_bytes / 1e9,
                "taken": (peak - plan.weight_bytes - plan.kv_bytes) / 1e9,
                "growth_mb": (later - first) / 1e6,
            }
        )
        del llm
    return rows


# -- 9. end to end -----------------------------------------------------------------------------------------------


def end_to_end(quick: bool) -> list[Row]:
    rows = []
    for shape in shapes(quick):
        loaded = make_random_model(shape, "bfloat16")
        for at_once in (2,) if quick else (8, 32, 128):
            equal = [Length(20, 3) if quick else Length(128, 128)] * (2 * at_once)
            mixed = mixed_lengths(2 * at_once, 32 if quick else 2)
            systems: list[System] = [MlxLm(concurrency=at_once), paged(max_num_seqs=at_once)]
            for label, lengths in (("equal", equal), ("mixed", mixed)):
                case = Case("on a GPU", f"{label}, {at_once} at once", lengths, systems)
                rows += [{"model": shape} | row for row in compare(case, loaded, 1 if quick else 2)]
    return rows


PARTS = [
    Part(wrapper, "The text around a kernel", {"kernel": ("kernel", ""), "same": ("as rebuilt", "")}),
    Part(correctness, "Correctness", {"what": ("what", ""), "result": ("result", "")}),
    Part(
        decode,
        "Decode",
        {
            "batch": ("batch", ""),
            "context": ("context", ","),
            "heads": ("heads", ""),
            "dtype": ("dtype", ""),
            "microseconds": ("µs", ",.1f"),
            "gigabytes": ("GB/s", ",.0f"),
            "share": ("of a copy", ".1%"),
        },
    ),
    Part(
        prefill,
        "Prefill, bfloat16",
        {
            "batch": ("batch", ""),
            "queries": ("queries", ","),
            "context": ("context", ","),
            "heads": ("heads", ""),
            "microseconds": ("µs", ",.1f"),
            "teraflops": ("TFLOP/s", ",.1f"),
            "share": ("of a product", ".1%"),
        },
    ),
    Part(
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
    ),
    Part(
        submission,
        "Decoding by MLX_MAX_MB_PER_BUFFER",
        {"limit": ("limit", ""), **bench.COLUMNS},
    ),
    Part(uploads, "An addition to an array", {"array": ("with one", ""), "microseconds": ("µs", ",.1f")}),
    Part(
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
    ),
    Part(end_to_end, "End to end", {"model": ("model", ""), **COLUMNS}),
]

if __name__ == "__main__":
    if not CUDA.is_available():
        sys.exit(
            "on_a_gpu.py: there is no CUDA device here; `pip install mlx[cuda13]` beside a card brings MLX's backend"
        )
    os.environ.update(EXACT)  # MLX reads it at its first product
    # Apart, because after an error in a kernel a process can't use the card any more.
    report.main("on_a_gpu.py", __doc__ or "", PARTS, apart=True, mlx_lm=mlx_lm.__version__)
