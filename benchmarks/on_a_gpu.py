"""Everything that there is to learn about the CUDA kernels on a card, in one command.

    pip install "mlx-paged[cuda,test]"
    python benchmarks/on_a_gpu.py [--quick] [--json FILE] [--only PART]

1. `wrapper`: the text that MLX puts around a kernel, against the one that the tests rebuild (tests/cuda_text.py)
2. `correctness`: tests/test_cuda_kernels.py, with the card in place of the simulator
3. `decode`: time of a step's attention, and its share of the bandwidth of a copy
4. `prefill`: the same, and its share of the rate of a large matrix product
5. `end_to_end`: tokens per second of a model with random weights, against mlx-lm's own batches

Times are medians of repetitions, each of several calls that are evaluated together, one after another.
"""

from __future__ import annotations

import importlib
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
import numpy as np
import report
from report import Part, Row

from mlx_paged import LLM, SamplingParams, cuda_kernels
from mlx_paged.attention import AttentionMetadata, attend
from mlx_paged.kernel_calls import prepare_merge

ROOT = Path(__file__).parents[1]

BLOCK_SIZE = 16


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

    def attend(self, **options: Any) -> mx.array:
        return attend(*self, scale=self.q.shape[2] ** -0.5, **options)

    def attend_with(self, q: mx.array) -> mx.array:
        return self._replace(q=q).attend(backend="cuda")


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


def name_of(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


# -- 1. the wrapper ----------------------------------------------------------------------------------------------


def wrapper(quick: bool) -> list[Row]:
    sys.path.append(str(ROOT / "tests"))
    cuda_text = importlib.import_module("cuda_text")
    rebuilt = {
        "paged_decode": cuda_text.record("decode", 4, mx.float16, (64, 64)).text,
        "paged_prefill": cuda_text.record("prefill", 4, mx.float16, (64, 64)).text,
        "paged_merge": cuda_text.record_merge(mx.float16, 64).text,
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
            mx.eval(decode.attend(backend="cuda"), prefill.attend(backend="cuda"))
            merge = prepare_merge(cuda_kernels.CUDA, mx.float16, (2, 8), 64, mx.zeros(8, mx.int32))
            mx.eval(merge([mx.zeros((4, 8, 64), mx.float16), mx.zeros((4, 8))]))
        finally:
            os.dup2(saved, 1)
            os.close(saved)
        captured.seek(0)
        texts = captured.read().decode().split("```")[1::2]
    for name, expected in rebuilt.items():
        text = next(text for text in texts if f"custom_kernel_{name}" in text)
        marker = "// What a kernel asks of the machine"  # before it stands what MLX includes
        same = without_names(text[text.index(marker) :]) == without_names(expected[expected.index(marker) :])
        rows.append({"kernel": name, "same": "yes" if same else "no", "text": text})
    return rows


def without_names(text: str) -> str:
    """Words of the text; the kernel's name, to which MLX appends the template arguments, shortened."""
    return " ".join("NAME(" if word.startswith("custom_kernel_") else word for word in text.replace("(", "( ").split())


# -- 2. correctness ----------------------------------------------------------------------------------------------


def run_tests() -> str:
    """What the tests of the kernels print."""
    command = [sys.executable, "-m", "pytest", "-q", "-ra", ROOT / "tests" / "test_cuda_kernels.py"]
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False)
    return done.stdout + done.stderr


def correctness(quick: bool) -> list[Row]:
    log = run_tests()
    rows = [{"what": "tests/test_cuda_kernels.py", "result": log.strip().splitlines()[-1], "log": log}]
    for dtype, heads, head_dim in ((mx.bfloat16, (32, 8), 128), (mx.float16, (14, 2), 64), (mx.float32, (8, 8), 128)):
        for num_queries, context in ((1, 40), (30, 50)) if quick else ((1, 2500), (300, 1500)):
            step = make_step(3, context, num_queries, heads, head_dim, dtype)
            exact = Step(*(array.astype(mx.float32) for array in step[:3]), step.metadata)
            out, expected = step.attend(backend="cuda").astype(mx.float32), exact.attend(backend="reference")
            error = (mx.linalg.norm(out - expected) / mx.linalg.norm(expected)).item()
            what = f"{name_of(dtype)} {heads[0]}/{heads[1]} heads of {head_dim}, {num_queries} of {context}"
            rows.append({"what": what, "result": f"relative error {error:.1e}", "log": ""})
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


# -- 5. end to end -----------------------------------------------------------------------------------------------


def random_model(quick: bool) -> Any:
    """A Llama of about a billion weights (quick: a small one), bfloat16."""
    llama = importlib.import_module("mlx_lm.models.llama")
    wide = {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "num_attention_heads": 32}
    small = {"hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 512, "num_attention_heads": 4}
    config = {"model_type": "llama", "num_key_value_heads": 2 if quick else 8, "rms_norm_eps": 1e-5}
    config |= {"vocab_size": 32000, **(small if quick else wide)}
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    return model


def end_to_end(quick: bool) -> list[Row]:
    generate = importlib.import_module("mlx_lm.generate")
    model, rng, rows = random_model(quick), np.random.default_rng(0), []
    batch, prompt_tokens, max_tokens = (2, 20, 5) if quick else (32, 1000, 200)
    prompts = [rng.integers(0, 32000, prompt_tokens).tolist() for _ in range(batch)]

    def unpaged() -> None:
        generator = generate.BatchGenerator(model, max_tokens=max_tokens, completion_batch_size=batch)
        generator.insert(prompts, [max_tokens] * batch)
        while generator.next_generated():
            pass
        generator.close()

    llm = LLM.from_model(model, max_num_seqs=batch, num_kv_blocks=batch * (-(-(prompt_tokens + max_tokens) // 16) + 1))
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    for name, run in (("mlx-lm", unpaged), ("mlx-paged", lambda: llm.generate(prompts, params))):
        run()
        started = time.perf_counter()
        run()
        took = time.perf_counter() - started
        rows.append({"engine": name, "batch": batch, "seconds": took, "tokens": batch * max_tokens / took})
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
        end_to_end,
        "End to end",
        {"engine": ("engine", ""), "batch": ("batch", ""), "seconds": ("s", ".2f"), "tokens": ("tokens/s", ",.0f")},
    ),
]

if __name__ == "__main__":
    if not cuda_kernels.is_available():
        sys.exit(
            "on_a_gpu.py: there is no CUDA device here; `pip install mlx[cuda13]` beside a card brings MLX's backend"
        )
    report.main("on_a_gpu.py", __doc__ or "", PARTS)
