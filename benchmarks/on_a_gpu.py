"""Everything that there is to learn about the CUDA kernels on a card, in one command of ten minutes at most.

    pip install "mlx-paged[cuda,test]"
    python benchmarks/on_a_gpu.py [--quick] [--json FILE] [--only PART,...]

The parts, the most telling first; `question` of each is printed before it runs:

- `wrapper`: the text that MLX puts around a kernel, against the one that the tests rebuild (helpers/cuda_text.py)
- `correctness`: contexts of 32,768 and 131,072 tokens, and a pool of more than 2^31 elements, against float64; then
  tests of the kernels and of the engine, with the card in place of the simulator (MLX_PAGED_LONG_TESTS=1 has all points
  of their grids, and takes longer than this script gives them)
- `decode`: time of a step's attention, and its share of the bandwidth of a copy, of which 85% is the goal for 32
  sequences
- `few_queries`: 1, 2, 4 and 8 tokens of one sequence after 16,384, as guesses are verified (attention.py)
- `end_to_end`: equal and mixed requests of models with random weights, beside mlx-lm's own batches on this card
- `prefill`: its share of the rate of a large matrix product, by the kernel, and by MLX's attention over gathered keys
  where `gathered.py` takes the layer
- `draws`: tokens of a step by the kernel that draws, and by plain operations (draws.py)
- `writer`, `writes`: whether kernels can write into what they are given; new keys and values written by the kernel and
  by MLX's scatter, when a step is submitted before and after the one before it is over
- `submission`: the same model where MLX ends a graph by the size of its inputs, pools among them, and where not
- `sharing_costs`, `shared_prefix`: what is measured at load of shared prefixes, and what reading one once saves
- `latent`: attention whose V is part of K, beside MLX's own over the same rows (latent.py)
- `memory`: what an engine takes by default, how much of it serving really takes, and whether that grows
- `uploads`: what an array costs that the host has made for a step, as those of positions and slots are

Each part runs in a process of its own within a limit, and is cut off at that. The file of results, in
benchmarks/results and named for the card unless `--json` names another, is written after each part, with the rows of a
part that was cut off or failed as far as it came. `--only` adds parts to what is there. TF32 is off: with it MLX rounds
float32 to 10 bits, and no comparison in float32 would hold. **It has not been run on a card yet.**
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any
from unittest import mock

import attention
import mlx.core as mx
import mlx_lm
import numpy as np
import report
from device_parts import ROOT, SHARING, WRITER, run_tests
from draws import DRAWS
from gpu_serving import END_TO_END, MEMORY, SUBMISSION, UPLOADS, WRITES
from gpu_steps import CUDA, make_step, name_of, relative_error, seconds, slots_of, step_at_the_end_of_a_pool
from latent import LATENT
from report import Part, Row

from mlx_paged.attention import gathered
from mlx_paged.cache.kv_cache import LayerPool
from mlx_paged.cache.layer_spec import LayerSpec
from mlx_paged.sampling.draw_kernel import draw_tokens

EXACT = {"MLX_ENABLE_TF32": "0"}


# -- the wrapper ----------------------------------------------------------------------------------------------


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
            decode, prefill = (make_step(1, 9, queries, (4, 1), 64, mx.float16) for queries in (1, 9))
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


# -- correctness ----------------------------------------------------------------------------------------------


TESTS = {
    "kernels": ["attention/test_kernels_decode.py", "attention/test_kernels_prefill.py",
                "attention/test_kernels_shared.py", "attention/test_kernels_latent.py",
                "attention/test_kernels_engine.py", "attention/test_kernels_write.py",
                "sampling/test_draw_kernel.py"],
    "engine": ["attention/test_paged_attention.py", "system/test_parity.py", "cache/test_kv_cache.py",
               "system/test_pipelining.py", "system/test_memory_flat.py", "engine/test_beams_in_engine.py",
               "cache/test_block_store.py", "models/test_demo.py"],
}  # fmt: skip


SECONDS = {"kernels": 80, "engine": 35}


def correctness(quick: bool) -> Iterator[Row]:
    lengths = [(1, 40), (30, 50)] if quick else [(1, 32768), (4, 32768), (1, 131072), (16, 131072)]
    for dtype, heads, head_dim in ((mx.bfloat16, (32, 8), 128), (mx.float16, (14, 2), 64), (mx.float32, (8, 8), 128)):
        for num_queries, context in lengths:
            step = make_step(1, context, num_queries, heads, head_dim, dtype)
            what = f"{name_of(dtype)} {heads[0]}/{heads[1]} heads of {head_dim}, {num_queries} of {context:,}"
            yield {"what": what, "result": f"relative error {relative_error(step):.1e}", "log": ""}
    step = step_at_the_end_of_a_pool(1 << (16 if quick else 31))
    what = f"a pool of {step.pool.keys.size:,} elements, its last blocks"
    yield {"what": what, "result": f"relative error {relative_error(step):.1e}", "log": ""}
    for what, files in TESTS.items():
        yield {"what": f"tests: {what}"} | run_tests(files, "metal", SECONDS[what], **EXACT)


# -- decode ---------------------------------------------------------------------------------------------------


GOAL = 0.85  # of a copy's bandwidth, for 32 sequences of 4,096 tokens and more in bfloat16


def copy_bandwidth(quick: bool) -> float:
    """Bytes per second, read and written, of a large copy."""
    source = mx.random.normal((1 << (20 if quick else 28),)).astype(mx.bfloat16)
    mx.eval(source)
    return 2 * source.nbytes / seconds(lambda x: x + 1, source, quick)


def decode(quick: bool) -> Iterator[Row]:
    copied = copy_bandwidth(quick)
    settings = [(32, 4096, (32, 8), 128), (32, 8192, (32, 8), 128), (32, 16384, (32, 8), 128), (1, 32768, (32, 8), 128),
                (8, 4096, (64, 8), 128), (32, 4096, (14, 2), 64), (32, 4096, (8, 8), 128), (8, 4096, (24, 4), 256),
                (8, 4096, (8, 1), 512)]  # fmt: skip
    for batch, context, heads, head_dim in [(2, 100, (8, 2), 64)] if quick else settings:
        for dtype in (mx.bfloat16, mx.float32):
            if dtype == mx.float32 and (context > 4096 or head_dim > 128):
                continue
            step = make_step(batch, context, 1, heads, head_dim, dtype)
            took = seconds(step.attend_with, step.q, quick)
            bandwidth = 2 * batch * context * heads[1] * head_dim * dtype.size / took
            counts = dtype == mx.bfloat16 and heads == (32, 8) and batch == 32
            yield {
                "batch": batch,
                "context": context,
                "heads": f"{heads[0]}/{heads[1]} x {head_dim}",
                "dtype": name_of(dtype),
                "microseconds": took * 1e6,
                "gigabytes": bandwidth / 1e9,
                "share": bandwidth / copied,
                "goal": ("reached" if bandwidth >= GOAL * copied else "missed") if counts else "-",
            }


# -- prefill --------------------------------------------------------------------------------------------------


def matrix_rate(quick: bool, dtype: mx.Dtype) -> float:
    """Operations per second of a product of large square matrices."""
    size = 256 if quick else 8192
    a, b = (mx.random.normal((size, size), scale=size**-0.5).astype(dtype) for _ in "ab")
    mx.eval(a, b)
    return 2 * size**3 / seconds(lambda x: x @ b, a, quick)


def prefill(quick: bool) -> Iterator[Row]:
    rate = matrix_rate(quick, mx.bfloat16)
    settings = [(1, 8192, 8192, (32, 8), 128), (4, 2048, 2048, (32, 8), 128), (1, 2048, 32768, (32, 8), 128),
                (1, 8192, 8192, (32, 8), 64), (1, 8192, 8192, (16, 8), 256), (32, 4, 4096, (32, 8), 128)]  # fmt: skip
    cases = [(2, 20, 50, (8, 2), 64)] if quick else settings
    for (batch, num_queries, context, heads, head_dim), way in product(cases, ("kernel", "gathered")):
        if (
            way == "gathered"
            and not quick
            and (num_queries < gathered.MIN_QUERIES or head_dim not in gathered.HEAD_DIMS)
        ):
            continue
        step = make_step(batch, context, num_queries, heads, head_dim, mx.bfloat16)
        with mock.patch.dict(os.environ, {gathered.VARIABLE: way}):
            took = seconds(step.attend_with, step.q, quick)
        visible = batch * num_queries * (context - (num_queries - 1) / 2)
        operations = 4 * visible * heads[0] * head_dim
        yield {
            "batch": batch,
            "queries": num_queries,
            "context": context,
            "heads": f"{heads[0]}/{heads[1]} x {head_dim}",
            "way": way,
            "microseconds": took * 1e6,
            "teraflops": operations / took / 1e12,
            "share": operations / took / rate,
        }


OF_ATTENTION = {part.run.__name__: part for part in attention.PARTS}
PARTS = [
    Part(
        wrapper,
        "The text around a kernel",
        {"kernel": ("kernel", ""), "same": ("as rebuilt", "")},
        "Is the text that MLX compiles the one that was tested here?",
        30,
    ),
    Part(
        correctness,
        "Correctness",
        {"what": ("what", ""), "result": ("result", "")},
        "Are the kernels right, over the tests' grids and in far places?",
        155,
    ),
    Part(
        decode,
        "Decode",
        {
            "batch": ("batch", ""),
            "context": ("context", ","),
            "heads": ("heads", ""),
            "dtype": ("dtype", ""),
            "microseconds": ("us", ",.1f"),
            "gigabytes": ("GB/s", ",.0f"),
            "share": ("of a copy", ".1%"),
            "goal": ("85%", ""),
        },
        "Which share of a copy's bandwidth does decode reach?",
        55,
    ),
    OF_ATTENTION["few_queries"]._replace(limit_s=35),
    END_TO_END._replace(limit_s=85),
    Part(
        prefill,
        "Prefill, bfloat16",
        {
            "batch": ("batch", ""),
            "queries": ("queries", ","),
            "context": ("context", ","),
            "heads": ("heads", ""),
            "way": ("by", ""),
            "microseconds": ("us", ",.1f"),
            "teraflops": ("TFLOP/s", ",.1f"),
            "share": ("of a product", ".1%"),
        },
        "Which share of a product's rate do prompts reach, by the kernel and gathered?",
        35,
    ),
    DRAWS._replace(limit_s=25),
    WRITER._replace(limit_s=15),
    WRITES._replace(limit_s=30),
    SUBMISSION._replace(limit_s=40),
    SHARING._replace(limit_s=15),
    OF_ATTENTION["shared_prefix"]._replace(limit_s=20),
    LATENT._replace(limit_s=25),
    MEMORY._replace(limit_s=20),
    UPLOADS._replace(limit_s=10),
]


def file_name(device_name: str) -> str:
    """Of the results of a card."""
    return f"on-a-gpu-{re.sub(r'[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


if __name__ == "__main__":
    if not CUDA.is_available():
        sys.exit(
            "on_a_gpu.py: there is no CUDA device here; `pip install mlx[cuda13]` beside a card brings MLX's backend"
        )
    os.environ.update(EXACT)  # MLX reads it at its first product
    file = ROOT / "benchmarks" / "results" / file_name(str(mx.device_info().get("device_name", "unknown")))
    # Apart, because after an error in a kernel a process can't use the card any more.
    report.main("on_a_gpu.py", __doc__ or "", PARTS, apart=True, file=file, mlx_lm=mlx_lm.__version__)
