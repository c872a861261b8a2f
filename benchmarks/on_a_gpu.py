"""Everything that there is to learn about the CUDA kernels on a card, in one command.

    pip install "mlx-paged[cuda,test]"
    python benchmarks/on_a_gpu.py [--quick] [--json FILE] [--only PART]

1. `wrapper`: the text that MLX puts around a kernel, against the one that the tests rebuild (helpers/cuda_text.py)
2. `correctness`: tests of the kernels (MLX_PAGED_LONG_TESTS=1: at every point of their grid) and of the engine, with
   the card in place of the simulator; contexts of 32,768 and 131,072 tokens, and a pool of more than 2^31 elements,
   against float64
3. `decode`: time of a step's attention, and its share of the bandwidth of a copy
4. `prefill`: the same, and its share of the rate of a large matrix product, by the kernel, and by MLX's attention over
   gathered keys where `gathered.py` takes the layer
5. `latent`: attention whose V is part of K, beside MLX's own over the same rows (latent.py)
6. `draws`: tokens of a step by the kernel that draws, and by plain operations (draws.py)
7. `writes`: new keys and values written by the kernel for it and by MLX's scatter, when a step is submitted before and
   after the one before it is over: tokens per second, and memory beside the pools
8. `submission`: the same model where MLX ends a graph by the size of its inputs, pools among them, and where not
9. `uploads`: what an array costs that the host has made for a step, as those of positions and slots are
10. `memory`: what an engine takes by default, how much of it serving really takes, and whether that grows
11. `end_to_end`: equal and mixed requests, 8, 32 and 128 at a time, beside mlx-lm's own batches

Parts 3 and 4 give medians of repetitions, each of several calls that are evaluated together, one after another. Each
part runs in a process of its own; `--only` with the same `--json` adds one to what is there. TF32 is off: with it MLX
rounds float32 to 10 bits, and no comparison in float32 would hold.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Callable
from itertools import product
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx_lm
import numpy as np
import report
from comparison.compare import COLUMNS
from draws import COLUMNS as DRAW_COLUMNS
from draws import draws
from gpu_serving import ROOT, end_to_end, memory, run_python, submission, uploads, writes
from gpu_steps import CUDA, make_step, name_of, relative_error, seconds, slots_of, step_at_the_end_of_a_pool
from latent import COLUMNS as LATENT_COLUMNS
from latent import latent
from report import Part, Row

from mlx_paged.attention import gathered
from mlx_paged.cache.kv_cache import LayerPool
from mlx_paged.cache.layer_spec import LayerSpec
from mlx_paged.sampling.draw_kernel import draw_tokens
from mlx_paged.tools import speed as bench

EXACT = {"MLX_ENABLE_TF32": "0"}


# -- 1. the wrapper ----------------------------------------------------------------------------------------------


def wrapper(quick: bool) -> list[Row]:
    sys.path.append(str(ROOT / "tests"))
    cuda_text = importlib.import_module("helpers.cuda_text")
    rebuilt = {
        "paged_decode": cuda_text.record("decode", 4, mx.float16, (64, 64)).text,
        "paged_prefill": cuda_text.record("prefill", 4, mx.float16, (64, 64)).text,
        "paged_latent": cuda_text.record("latent", 4, mx.float16, (64, 48)).text,
        "paged_merge": cuda_text.record_merge(mx.float16, 64).text,
        "paged_write": cuda_text.record_write(mx.float16, (64, 64)).text,
        "draw_tokens": cuda_text.record_draw().text,
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
            of_latents = prefill._replace(pool=LayerPool({"k": prefill.pool.keys}, latent_dim=48))
            mx.eval(decode.attend(), prefill.attend(), of_latents.attend())
            merge = CUDA.prepare_merge(mx.zeros((2, 8, 8), mx.float16), 64, mx.zeros(8, mx.int32))
            mx.eval(merge([mx.zeros((4, 8, 64), mx.float16), mx.zeros((4, 8))]))
            pool = LayerPool.zeros(LayerSpec(2, 64, 64, mx.float16), 3, 16)
            metadata = slots_of(mx.arange(3), mx.arange(3))
            CUDA.write(pool, metadata, pool.keys[0, :3], pool.values[0, :3])
            mx.eval(pool.write_done, draw_tokens("cuda", mx.zeros((2, 1000)), np.zeros((2, 8), np.uint32)))
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
                "attention/test_kernels_shared.py", "attention/test_kernels_latent.py",
                "attention/test_kernels_engine.py", "attention/test_kernels_write.py",
                "sampling/test_draw_kernel.py"],
    "engine": ["attention/test_paged_attention.py", "system/test_parity.py", "cache/test_kv_cache.py",
               "system/test_pipelining.py", "system/test_memory_flat.py", "engine/test_beams_in_engine.py",
               "cache/test_block_store.py", "models/test_demo.py"],
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
    what = f"a pool of {step.pool.keys.size:,} elements, its last blocks"
    rows.append({"what": what, "result": f"relative error {relative_error(step):.1e}", "log": ""})
    return rows


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
    cases = [(2, 20, 50, (8, 2), 64)] if quick else settings
    for (batch, num_queries, context, heads, head_dim), way in product(cases, ("kernel", "gathered")):
        if way == "gathered" and not quick and num_queries < gathered.MIN_QUERIES:
            continue
        step = make_step(batch, context, num_queries, heads, head_dim, mx.bfloat16)
        with mock.patch.dict(os.environ, {gathered.VARIABLE: way}):
            took = seconds(step.attend_with, step.q, calls=1 if quick else 5)
        visible = batch * num_queries * (context - (num_queries - 1) / 2)
        operations = 4 * visible * heads[0] * head_dim
        rows.append(
            {
                "batch": batch,
                "queries": num_queries,
                "context": context,
                "heads": f"{heads[0]}/{heads[1]} x {head_dim}",
                "way": way,
                "microseconds": took * 1e6,
                "teraflops": operations / took / 1e12,
                "share": operations / took / rate,
            }
        )
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
            "way": ("by", ""),
            "microseconds": ("µs", ",.1f"),
            "teraflops": ("TFLOP/s", ",.1f"),
            "share": ("of a product", ".1%"),
        },
    ),
    Part(latent, "Latent attention, bfloat16 (µs)", LATENT_COLUMNS),
    Part(draws, "Draws of a step's tokens (µs)", DRAW_COLUMNS),
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
