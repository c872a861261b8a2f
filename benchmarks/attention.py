"""How fast attention over a paged KV cache is on this device, beside MLX's own attention over contiguous K and V.

    python benchmarks/attention.py --json attention.json    measure, print tables, write the raw numbers

On a Mac on_a_mac.sh runs this, on an NVIDIA card on_a_gpu.py some of it. **It has not been run on either yet**; the
committed results are those of a Linux CPU, where no kernel runs, by an earlier version of this script. What computes is
the best backend for the device, or the one that the environment variable MLX_PAGED_BACKEND names; each row says which
it was. Shapes are those of a GPU, or on a CPU a few small ones in float32; those that the device's memory does not hold
are left out, with a line that says so. Further: --quick, --only PART and --markdown FILE, as in the other benchmarks.

Three contenders: *paged*, `attend` over a pool of blocks in random order, by a kernel where there is one; *contiguous*,
MLX's `scaled_dot_product_attention` over K and V that lie [num_seqs, num_kv_heads, context, head_dim], as in mlx-lm's
cache; *gathered*, the same function after the blocks were gathered, as MLX_PAGED_PREFILL=gathered has it done. Before
they are timed their results are compared with numpy's in float32: `error` is |result - expected| / |expected| (norms
over the queries looked at) of the first one, `agrees` names those above the tolerance of the dtype, 2e-5 in float32,
1e-3 in float16, 8e-3 in bfloat16.

What is timed is one `mx.eval`, with `mx.synchronize` before and after it, of a chain of calls, whose graph was built
before. Each call's queries are the results of the call before, so calls follow one another as those of a model's layers
do, and a chain has as many of them (at most 512) as take 20 ms: submitting the work and waiting for the last result are
then a small part of it, while what each call costs the device to start is left in. For a second, chains of all
contenders only warm up, so that clocks have risen; then each has windows of 0.4 s, of chain after chain. Each call
reads K and V of another layer, of so many that together they exceed what caches hold (256 MB on a GPU, 64 MB on a CPU,
as far as memory goes). Contenders alternate, the order turning round each time; times are medians of three windows,
`spread` the widest range of a contender's windows as a share of its median: where it is large, something else used the
machine.

GB/s counts the bytes that must be moved at least: K and V of all visible tokens once, queries and results. `of copy` is
its share of what adding 1 to a large array reads and writes here (on a CPU with one core, which others may exceed).
TFLOP/s counts 4 x head_dim for each head and each pair of a query and a key it sees; `of matmul` is its share of a
large square matrix product of the same dtype.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

import mlx.core as mx
import numpy as np
import report
from attention_layers import ON_CPU, Case, Contender, Heads, compare, measure, with_dense, with_prefix, with_prompts
from report import Part, Row

import mlx_paged
from mlx_paged.runner.memory_plan import device_limit

LLAMA_8B = Heads(32, 8, 128, mx.float32 if ON_CPU else mx.bfloat16)
QWEN2_500M = Heads(14, 2, 64, mx.float32 if ON_CPU else mx.float16)
TINY = Heads(4, 1, 64, LLAMA_8B.dtype)


# -- what the device can do --------------------------------------------------------------------------------------


@cache
def copy_bandwidth(quick: bool) -> float:
    """Bytes per second that adding 1 to a large array of float32, in place, reads and writes."""
    num_bytes = 1 << 20 if quick else min(64 << 20 if ON_CPU else 1 << 30, device_limit()[0] // 8)
    numbers = mx.zeros(num_bytes // 4)
    mx.eval(numbers)
    adding = Contender(numbers, lambda x, _: x + 1)  # all but the first of a chain write where they read
    return 2 * num_bytes / measure({"copy": adding}, quick)["copy"]


@cache
def matmul_rate(dtype: mx.Dtype, quick: bool) -> float:
    """Floating-point operations per second of a large square matrix product."""
    size = 128 if quick else 2048 if ON_CPU else 4096
    left, right = (mx.random.normal((size, size)).astype(dtype) * size**-0.25 for _ in range(2))
    mx.eval(left, right)
    return 2 * size**3 / measure({"product": Contender(left, lambda x, _: x @ right)}, quick)["product"]


def limits(quick: bool) -> list[Row]:
    """What shares are of."""
    rows = [{"what": "copy", "dtype": "float32", "rate": copy_bandwidth(quick) / 1e9, "unit": "GB/s"}]
    for heads in {heads.dtype: heads for heads in (LLAMA_8B, QWEN2_500M)}.values():
        rate = matmul_rate(heads.dtype, quick) / 1e12
        rows.append({"what": "matmul", "dtype": heads.as_columns()["dtype"], "rate": rate, "unit": "TFLOP/s"})
    return rows


# -- parts -------------------------------------------------------------------------------------------------------


def decode(quick: bool) -> Iterator[Row]:
    """One query for each sequence."""
    large, small = [(1, 16384), (32, 4096), (8, 4096), (1, 4096), (8, 16384), (32, 1024)], [(1, 16384), (32, 4096)]
    if ON_CPU:
        large = small = list(product((1, 8), (1024, 4096)))
    if quick:
        large, small = [(1, 33), (3, 200)], [(3, 33)]
    for heads, sizes in ((LLAMA_8B, large), (QWEN2_500M, small)):
        for batch, context in sizes:
            case = Case(heads, batch, context)
            if (row := compare(case, with_dense, quick)) is not None:
                yield {"batch": batch, "context": context} | row | _bandwidth(case, row, quick)


def few_queries(quick: bool) -> Iterator[Row]:
    """Some tokens of one sequence after a long context, as when guesses at its next ones are verified."""
    context = 100 if quick else 1024 if ON_CPU else 16384
    of_one: dict[Heads, float] = {}
    for num_queries, heads in product((1, 2, 4, 8), (TINY,) if quick else (LLAMA_8B, QWEN2_500M)):
        if heads is QWEN2_500M and num_queries > 2:
            continue  # more rows than decode takes, of 7 heads to a KV head: as LLAMA_8B's with 8
        case = Case(heads, 1, context, num_queries)
        if (row := compare(case, with_dense, quick)) is not None:
            ratio = row["paged_us"] / of_one.setdefault(heads, row["paged_us"])
            yield {"queries": num_queries, "context": context} | row | _bandwidth(case, row, quick) | {"ratio": ratio}


def long_heads(quick: bool) -> Iterator[Row]:
    """Heads of 512, as those of Gemma 4's layers without a window, in decode and in a chunk of a prompt."""
    heads = Heads(8, 1, 512, LLAMA_8B.dtype)
    sizes = [(1, 1, 4096), (1, 128, 512)] if ON_CPU else [(1, 1, 16384), (8, 1, 4096), (1, 512, 2048)]
    for batch, num_queries, context in [(1, 1, 40), (1, 9, 50)] if quick else sizes:
        case = Case(heads, batch, context, num_queries)
        if (row := compare(case, with_dense, quick)) is not None:
            yield {"batch": batch, "queries": num_queries, "context": context} | row


def _bandwidth(case: Case, row: Row, quick: bool) -> Row:
    rates = {name: case.compulsory_bytes() / row[f"{name}_us"] / 1e3 for name in ("paged", "contiguous")}
    return {
        "compulsory_bytes": case.compulsory_bytes(),
        "gb_per_s": rates["paged"],
        "of_copy": rates["paged"] * 1e9 / copy_bandwidth(quick),
        "contiguous_of_copy": rates["contiguous"] * 1e9 / copy_bandwidth(quick),
    }


def prefill(quick: bool) -> Iterator[Row]:
    """A chunk of one prompt, alone and after others."""
    large = LLAMA_8B
    chunks = [(large, 512, 8192), (large, 2048, 0), (large, 8192, 0), (large, 2048, 8192), (QWEN2_500M, 2048, 0)]
    if ON_CPU:
        chunks = [(large, 128, 0), (large, 512, 0), (large, 512, 1024), (QWEN2_500M, 512, 0)]
    if quick:
        chunks = [(large, 33, 0), (QWEN2_500M, 17, 50)]
    for heads, chunk, prior in chunks:
        case = Case(heads, 1, chunk + prior, num_queries=chunk)
        if (row := compare(case, with_prompts, quick)) is not None:
            rates = {name: case.flops() / row[f"{name}_us"] * 1e6 for name in ("paged", "contiguous")}
            rate = matmul_rate(heads.dtype, quick)
            row |= {"flops": case.flops(), "tflop_per_s": rates["paged"] / 1e12}
            row |= {"of_matmul": rates["paged"] / rate, "contiguous_of_matmul": rates["contiguous"] / rate}
            yield {"chunk": chunk, "prior": prior} | row


def block_order(quick: bool) -> Iterator[Row]:
    """Paged decode attention alone, over blocks one after another in memory and in random order."""
    sizes = [(8, 1024), (8, 4096)] if ON_CPU else [(1, 16384), (8, 4096)]
    for batch, context in [(2, 100)] if quick else sizes:
        case = Case(LLAMA_8B, batch, context)
        row = compare(
            case, lambda layers: {kind: (layers.paged(kind), kind) for kind in ("consecutive", "scattered")}, quick
        )
        if row is not None:
            ratio = row["scattered_us"] / row["consecutive_us"]
            yield {"batch": batch, "context": context} | row | {"ratio": ratio}


def shared_prefix(quick: bool) -> Iterator[Row]:
    """Decodes whose contexts begin with the same tokens: over the same blocks, which are read once or by each sequence,
    and over blocks of their own.

    The compulsory bytes are those of the same blocks: what they share is read once.
    """
    sizes = [(8, 1024, 64)] if ON_CPU else [(8, 4096, 256), (32, 4096, 256)]
    for batch, prefix, own in [(4, 192, 9)] if quick else sizes:
        case = Case(TINY if quick else LLAMA_8B, batch, prefix + own, prefix=prefix)
        if (row := compare(case, with_prefix, quick)) is not None:
            row["compulsory_bytes"] = case.compulsory_bytes()
            row["gb_per_s"] = case.compulsory_bytes() / row["once_us"] / 1e3
            row["speedup"] = row["each_us"] / row["once_us"]
            yield {"batch": batch, "prefix": prefix, "own": own} | row


# -- tables ------------------------------------------------------------------------------------------------------


_HEADS = {"heads": ("heads", ""), "head_dim": ("dim", ""), "dtype": ("dtype", ""), "backend": ("backend", "")}
_TIMES = {f"{name}_us": (name, ",.0f") for name in ("paged", "contiguous", "gathered")}
_CHECK = {"spread": ("spread", ".0%"), "error": ("error", ".0e"), "agrees": ("agrees", "")}
_RATE = {"gb_per_s": ("GB/s", ",.1f"), "of_copy": ("of copy", ".0%")}
_RATE |= {"contiguous_of_copy": ("contiguous of copy", ".0%")}
PARTS = (
    Part(
        limits,
        "what shares are of",
        {"what": ("", ""), "dtype": ("dtype", ""), "rate": ("rate", ",.2f"), "unit": ("", "")},
        "What do a copy and a matrix product reach here?",
        15,
    ),
    Part(
        decode,
        "decode: one query for each sequence (us)",
        _HEADS | {"batch": ("batch", ""), "context": ("context", ",")} | _TIMES | _RATE | _CHECK,
        "How near to a copy's bandwidth does decode come, beside MLX's own attention?",
        65,
    ),
    Part(
        few_queries,
        "decode of several queries of one sequence (us)",
        _HEADS
        | {"queries": ("queries", ""), "context": ("context", ",")}
        | _TIMES
        | {"ratio": ("of one's", ".2f")}
        | _RATE
        | _CHECK,
        "What do 2, 4 and 8 tokens to verify take beside one?",
        45,
    ),
    Part(
        prefill,
        "prefill: a chunk of one prompt after `prior` tokens (us)",
        _HEADS
        | {"chunk": ("chunk", ","), "prior": ("prior", ",")}
        | _TIMES
        | {"tflop_per_s": ("TFLOP/s", ",.2f"), "of_matmul": ("of matmul", ".0%")}
        | {"contiguous_of_matmul": ("contiguous of matmul", ".0%")}
        | _CHECK,
        "Are prompts faster by the kernel, or gathered for MLX's own attention?",
        45,
    ),
    Part(
        long_heads,
        "heads of 512: decode, and a chunk of a prompt (us)",
        _HEADS | {"batch": ("batch", ""), "queries": ("queries", ""), "context": ("context", ",")} | _TIMES | _CHECK,
        "Are kernels for heads of 512 right, and do they pay?",
        25,
    ),
    Part(
        block_order,
        "decode over consecutive and over scattered blocks (us)",
        _HEADS
        | {"batch": ("batch", ""), "context": ("context", ",")}
        | {"consecutive_us": ("consecutive", ",.0f"), "scattered_us": ("scattered", ",.0f")}
        | {"ratio": ("ratio", ".2f")}
        | _CHECK,
        "Does it matter where blocks lie?",
        20,
    ),
    Part(
        shared_prefix,
        "decode of sequences with a common prefix: read once, by each of them, and in blocks of their own (us)",
        _HEADS
        | {"batch": ("batch", ""), "prefix": ("prefix", ","), "own": ("own", ",")}
        | {f"{name}_us": (name, ",.0f") for name in ("once", "each", "separate", "contiguous")}
        | {"gb_per_s": ("GB/s", ",.1f"), "speedup": ("each / once", ".2f")}
        | _CHECK,
        "Does it pay to read a common prefix once, and how many sequences does that take?",
        25,
    ),
)


def commit() -> str:
    """Of the checkout that this is, with a + if it was changed; empty outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def operating_system() -> str:
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return platform.system()


if __name__ == "__main__":
    memory, kind = device_limit()
    report.main(
        "attention.py",
        __doc__,
        PARTS,
        device_info=mx.device_info(),
        memory_bytes=memory,
        memory_is=kind,
        os=operating_system(),
        numpy=np.__version__,
        mlx_paged=mlx_paged.__version__,
        commit=commit(),
        forced_backend=os.environ.get("MLX_PAGED_BACKEND", ""),
    )
