"""How fast attention over a paged KV cache is on this device, beside MLX's own attention over contiguous K and V.

    python benchmarks/attention.py --json attention.json    measure, print tables, write the raw numbers

That is all there is to do on a Mac: please open an issue with the JSON. **It has not been run on a Mac yet**, nor has
any part of this project; the committed results are those of a Linux CPU, where no kernel runs. What computes is the
best backend for the device, or the one that the environment variable MLX_PAGED_BACKEND names; each row says which it
was. Shapes are those of a GPU, or on a CPU a few small ones in float32; those that the device's memory does not hold
are left out, with a line that says so. Further: --quick, --only PART and --markdown FILE, as in the other benchmarks.

Three contenders: *paged*, `attend` over a pool of blocks in random order; *contiguous*, MLX's
`scaled_dot_product_attention` over K and V that lie [num_seqs, num_kv_heads, context, head_dim], as in mlx-lm's cache;
*gathered*, the same function after the blocks were gathered. Before they are timed their results are compared with
numpy's in float32: `error` is |result - expected| / |expected| (norms over the queries looked at) of the first one,
`agrees` names those above the tolerance of the dtype, 2e-5 in float32, 1e-3 in float16, 8e-3 in bfloat16.

What is timed is one `mx.eval`, with `mx.synchronize` before and after it, of a chain of calls, whose graph was built
before. Each call's queries are the results of the call before, so calls follow one another as those of a model's layers
do, and a chain has as many of them (at most 512) as take 20 ms: submitting the work and waiting for the last result are
then a small part of it, while what each call costs the device to start is left in. Each call reads K and V of another
layer, of so many that together they exceed what caches hold (256 MB on a GPU, 64 MB on a CPU, as far as memory goes).
Contenders alternate, the order turning round each time; times are medians, `spread` the widest interquartile range of
the contenders as a share of its median: where it is large, something else used the machine.

GB/s counts the bytes that must be moved at least: K and V of all visible tokens once, queries and results. `of copy` is
its share of what adding 1 to a large array reads and writes here (on a CPU with one core, which others may exceed).
TFLOP/s counts 4 x head_dim for each head and each pair of a query and a key it sees; `of matmul` is its share of a
large square matrix product of the same dtype.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import report
from report import Part, Row

import mlx_paged
from mlx_paged import paged_attention
from mlx_paged.attention import paged_attention as attention
from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.attention.paged_attention import attend
from mlx_paged.runner.memory_plan import device_limit

BLOCK_SIZE = 16
ON_CPU = mx.default_device() == mx.cpu
TOLERANCES = {mx.float32: 2e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}
CACHES = 64 << 20 if ON_CPU else 256 << 20
NOT_FINITE = 1e9  # the error of such results: JSON has no word for it
CHAIN_SECONDS = 0.02
MOST_CALLS = 512


class Heads(NamedTuple):
    """What of a model's attention matters here."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: mx.Dtype

    def kv_bytes(self, num_tokens: int) -> int:
        """Of K and V of so many tokens."""
        return 2 * num_tokens * self.num_kv_heads * self.head_dim * self.dtype.size

    def query_bytes(self, num_tokens: int) -> int:
        """Of queries and results of so many tokens."""
        return 2 * num_tokens * self.num_heads * self.head_dim * self.dtype.size

    def as_columns(self) -> Row:
        dtype = str(self.dtype).removeprefix("mlx.core.")
        return {"heads": f"{self.num_heads}/{self.num_kv_heads}", "head_dim": self.head_dim, "dtype": dtype}


LLAMA_8B = Heads(32, 8, 128, mx.float32 if ON_CPU else mx.bfloat16)
QWEN2_500M = Heads(14, 2, 64, mx.float32 if ON_CPU else mx.float16)


class Contender(NamedTuple):
    """A way to compute attention. call: queries and the number of a layer -> results in the queries' form."""

    queries: mx.array
    call: Callable[[mx.array, int], mx.array]
    num_layers: int = 1


# -- timing ------------------------------------------------------------------------------------------------------


def seconds_of_call(contender: Contender, num_calls: int) -> float:
    """The mean of a chain of so many."""
    out = contender.queries
    for number in range(num_calls):
        out = contender.call(out, number % contender.num_layers)
    mx.synchronize()
    started = time.perf_counter()
    mx.eval(out)
    mx.synchronize()
    return (time.perf_counter() - started) / num_calls


def measure(contenders: dict[str, Contender], quick: bool) -> dict[str, float]:
    """Median seconds of a call of each, and `spread`: the widest of their interquartile ranges, over its median."""
    num_calls = {}
    for name, contender in contenders.items():
        num_calls[name] = 2
        for _ in range(0 if quick else 4):  # at first what is not the calls themselves is most of it
            seconds = seconds_of_call(contender, num_calls[name])
            num_calls[name] = max(1, min(MOST_CALLS, round(CHAIN_SECONDS / seconds)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repetition in range(-1, 2 if quick else 9 if ON_CPU else 15):
        for name in list(contenders)[:: 1 if repetition % 2 else -1]:
            seconds = seconds_of_call(contenders[name], num_calls[name])
            if repetition >= 0:  # the first is to warm up
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ranges = {name: float(np.subtract(*np.quantile(values, [0.75, 0.25]))) for name, values in times.items()}
    return medians | {"spread": max(ranges[name] / medians[name] for name in contenders)}


# -- what the device can do --------------------------------------------------------------------------------------


@cache
def copy_bandwidth(quick: bool) -> float:
    """Bytes per second that adding 1 to a large array of float32, in place, reads and writes."""
    num_bytes = 1 << 20 if quick else min(64 << 20 if ON_CPU else 1 << 30, device_limit()[0] // 8)
    numbers = mx.zeros(num_bytes // 4)
    mx.eval(numbers)
    adding = Contender(numbers, lambda x, _: x + 1)  # all but the first of a chain write where they read
    times = [seconds_of_call(adding, 32) for _ in range(3 if quick else 11)]
    return 2 * num_bytes / statistics.median(times[1:])


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


# -- what is compared --------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """Sequences of one length. prefix: tokens at the start of their contexts that are the same in all of them."""

    heads: Heads
    batch: int
    context: int
    num_queries: int = 1
    prefix: int = 0

    def __str__(self) -> str:
        """For the lines on stderr that say how far it is."""
        heads, num_heads = self.heads, f"{self.heads.num_heads}/{self.heads.num_kv_heads}"
        return f"{num_heads} x {heads.head_dim}, batch {self.batch}, {self.num_queries} of {self.context:,} tokens"

    def tables(self) -> dict[str, np.ndarray]:
        """Block tables, int32 [batch, blocks of a context], over one pool: a sequence has blocks of its own.

        But in `shared` all begin with the first sequence's blocks of the prefix.
        """
        per_sequence = -(-self.context // BLOCK_SIZE)
        num_blocks = self.batch * per_sequence
        consecutive = np.arange(num_blocks, dtype=np.int32).reshape(self.batch, per_sequence)
        scattered = np.random.default_rng(0).permutation(num_blocks).astype(np.int32).reshape(consecutive.shape)
        shared = scattered.copy()
        shared[:, : self.prefix // BLOCK_SIZE] = scattered[0, : self.prefix // BLOCK_SIZE]
        return {"consecutive": consecutive, "scattered": scattered, "shared": shared}

    def distinct_tokens(self) -> int:
        return self.prefix + self.batch * (self.context - self.prefix)

    def compulsory_bytes(self) -> int:
        return self.heads.kv_bytes(self.distinct_tokens()) + self.heads.query_bytes(self.batch * self.num_queries)

    def flops(self) -> int:
        pairs = self.num_queries * (2 * self.context - self.num_queries + 1) // 2  # causal
        return 4 * self.batch * self.heads.num_heads * self.heads.head_dim * pairs

    def num_layers(self) -> int:
        """How many fit, at most as many as exceed the caches. 0: not one fits, with a line on stderr."""
        kv_bytes = self.heads.kv_bytes(self.batch * self.context)
        # A layer's pool and its contiguous K and V; what is gathered; queries and results.
        room = int(0.7 * device_limit()[0]) - 3 * kv_bytes - 4 * self.heads.query_bytes(self.batch * self.num_queries)
        if room < 2 * kv_bytes:
            print(f"left out for want of memory: {self}", file=sys.stderr)
            return 0
        return min(MOST_CALLS, -(-CACHES // self.heads.kv_bytes(self.distinct_tokens())), room // (2 * kv_bytes))


class Layers:
    """K and V of several layers, in blocks and contiguous, and a step's queries."""

    def __init__(self, case: Case, num_layers: int, quick: bool) -> None:
        heads, self.case, self.num_layers = case.heads, case, 2 if quick else num_layers
        self.tables = {name: mx.array(table) for name, table in case.tables().items()}
        contexts = np.full(case.batch, case.context, np.int32)
        starts = np.arange(case.batch + 1, dtype=np.int32) * case.num_queries
        self.metadata = {name: AttentionMetadata(table, contexts, starts) for name, table in self.tables.items()}
        shape = (self.tables["scattered"].size, BLOCK_SIZE, heads.num_kv_heads, heads.head_dim)
        self.pools = []
        for _ in range(self.num_layers):
            self.pools.append([mx.random.normal(shape, heads.dtype) for _ in range(2)])
            mx.eval(self.pools[-1])
        self.contiguous: list[list[mx.array]] = []
        shape = (case.batch, heads.num_heads, case.num_queries, heads.head_dim)
        self.queries = mx.random.normal(shape, heads.dtype) * 2
        self.packed_queries = mx.contiguous(self._packed(self.queries))
        mx.eval(self.queries, self.packed_queries)

    def _packed(self, queries: mx.array) -> mx.array:
        """[batch, num_heads, num_queries, head_dim] -> [num_tokens, num_heads, head_dim]."""
        return queries.swapaxes(1, 2).flatten(0, 1)

    def _gather(self, cache: mx.array, table: str) -> mx.array:
        """[num_blocks, block_size, num_kv_heads, head_dim] -> [batch, num_kv_heads, context, head_dim], a view."""
        return cache[self.tables[table]].flatten(1, 2)[:, : self.case.context].swapaxes(1, 2)

    def _dense(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        mask = "causal" if self.case.num_queries > 1 else None
        scale = self.case.heads.head_dim**-0.5
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)

    def paged(self, table: str) -> Contender:
        metadata, scale = self.metadata[table], self.case.heads.head_dim**-0.5
        return Contender(
            self.packed_queries,
            lambda queries, layer: attend(queries, *self.pools[layer], metadata, AttentionOptions(scale)),
            self.num_layers,
        )

    def of_contiguous(self, table: str) -> Contender:
        if not self.contiguous:
            for pool in self.pools:
                self.contiguous.append([mx.contiguous(self._gather(cache, table)) for cache in pool])
                mx.eval(self.contiguous[-1])
        return Contender(
            self.queries, lambda queries, layer: self._dense(queries, *self.contiguous[layer]), self.num_layers
        )

    def gathered(self, table: str) -> Contender:
        return Contender(
            self.queries,
            lambda queries, layer: self._dense(queries, *(self._gather(cache, table) for cache in self.pools[layer])),
            self.num_layers,
        )

    def backend(self) -> str:
        """The backend that `attend` chooses for such arrays."""
        forced = os.environ.get("MLX_PAGED_BACKEND")
        one_query = self.packed_queries[:1], *self.pools[0], self.tables["scattered"][:1]
        lengths = mx.array([1], mx.int32), mx.array([0, 1], mx.int32)
        for name in [forced] if forced else attention.BACKENDS:
            try:
                paged_attention(*one_query, *lengths, scale=1.0, backend=name)
                return name
            except ValueError:
                continue
        return "none"

    def error(self, contender: Contender, table: str) -> float:
        """How far the results of a call are from those of numpy in float32, relative, for up to 4 sequences.

        Of each, at most 8 queries are looked at, the first and the last among them.
        """
        out = contender.call(contender.queries, 0)
        out = out if out.ndim == 3 else self._packed(out)
        context, num_queries = self.case.context, self.case.num_queries
        queries = np.unique(np.linspace(0, num_queries - 1, 8).astype(int))
        wrong, size = 0.0, 0.0
        for sequence in np.unique(np.linspace(0, self.case.batch - 1, 4).astype(int)).tolist():
            tokens = mx.array(sequence * num_queries + queries)
            caches = [cache[self.tables[table][sequence]].flatten(0, 1)[:context] for cache in self.pools[0]]
            host = [np.array(array.astype(mx.float32)) for array in (self.packed_queries[tokens], *caches, out[tokens])]
            expected = dense_attention(*host[:3], positions=context - num_queries + queries)
            wrong += float(np.square(host[3] - expected).sum())
            size += float(np.square(expected).sum())
        error = (wrong / size) ** 0.5
        return error if np.isfinite(error) else NOT_FINITE


def dense_attention(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """By numpy: queries [n, num_heads, head_dim] over keys and values [context, num_kv_heads, head_dim].

    positions: [n], the last key that each query sees. Returns [n, num_heads, head_dim].
    """
    num_queries, _, head_dim = queries.shape
    context, num_kv_heads, _ = keys.shape
    rows = queries.reshape(num_queries, num_kv_heads, -1, head_dim).transpose(1, 2, 0, 3)
    scores = rows.reshape(num_kv_heads, -1, head_dim) @ keys.transpose(1, 2, 0) * head_dim**-0.5
    scores = np.where(np.arange(context) <= positions[:, None], scores.reshape(*rows.shape[:3], context), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out = weights.reshape(num_kv_heads, -1, context) @ values.swapaxes(0, 1)
    return out.reshape(rows.shape).transpose(2, 0, 1, 3).reshape(queries.shape)


def compare(case: Case, make: Callable[[Layers], dict[str, tuple[Contender, str]]], quick: bool) -> Row | None:
    """Errors and times (`..._us`) of the contenders, each with its block table; None without room for the case."""
    num_layers = case.num_layers()
    if num_layers == 0:
        return None
    layers = Layers(case, num_layers, quick)
    contenders = make(layers)
    errors = {name: layers.error(contender, table) for name, (contender, table) in contenders.items()}
    wrong = [name for name, error in errors.items() if error > TOLERANCES[case.heads.dtype]]
    seconds = measure({name: contender for name, (contender, _) in contenders.items()}, quick)
    spread = seconds.pop("spread")
    row = {"backend": layers.backend(), "layers": layers.num_layers} | case.heads.as_columns()
    row |= {"error": errors[next(iter(errors))], "agrees": "yes" if not wrong else f"NOT {', '.join(wrong)}"}
    row |= {f"{name}_error": error for name, error in errors.items()}
    row |= {f"{name}_us": 1e6 * value for name, value in seconds.items()} | {"spread": spread}
    print(f"{case}: {', '.join(f'{name} {1e6 * value:,.0f} us' for name, value in seconds.items())}", file=sys.stderr)
    mx.clear_cache()
    return row


def with_dense(layers: Layers) -> dict[str, tuple[Contender, str]]:
    table = "scattered"
    ways = {"paged": layers.paged, "contiguous": layers.of_contiguous, "gathered": layers.gathered}
    return {name: (way(table), table) for name, way in ways.items()}


# -- parts -------------------------------------------------------------------------------------------------------


def decode(quick: bool) -> list[Row]:
    """One query for each sequence."""
    batches, contexts = ((1, 8), (1024, 4096)) if ON_CPU else ((1, 8, 32), (1024, 4096, 16384, 32768))
    if quick:
        batches, contexts = (1, 3), (33, 200)
    rows = []
    for heads in (LLAMA_8B, QWEN2_500M):
        for batch in batches:
            for context in contexts:
                case = Case(heads, batch, context)
                if (row := compare(case, with_dense, quick)) is not None:
                    rows.append({"batch": batch, "context": context} | row | _bandwidth(case, row, quick))
    return rows


def _bandwidth(case: Case, row: Row, quick: bool) -> Row:
    rates = {name: case.compulsory_bytes() / row[f"{name}_us"] / 1e3 for name in ("paged", "contiguous")}
    return {
        "compulsory_bytes": case.compulsory_bytes(),
        "gb_per_s": rates["paged"],
        "of_copy": rates["paged"] * 1e9 / copy_bandwidth(quick),
        "contiguous_of_copy": rates["contiguous"] * 1e9 / copy_bandwidth(quick),
    }


def prefill(quick: bool) -> list[Row]:
    """A chunk of one prompt, alone and after others."""
    large = LLAMA_8B
    chunks = [(large, 512, 0), (large, 2048, 0), (large, 8192, 0)]
    chunks += [(large, 512, 8192), (large, 2048, 8192), (large, 8192, 8192), (QWEN2_500M, 2048, 0)]
    if ON_CPU:
        chunks = [(large, 128, 0), (large, 512, 0), (large, 512, 1024), (QWEN2_500M, 512, 0)]
    if quick:
        chunks = [(large, 33, 0), (QWEN2_500M, 17, 50)]
    rows = []
    for heads, chunk, prior in chunks:
        case = Case(heads, 1, chunk + prior, num_queries=chunk)
        if (row := compare(case, with_dense, quick)) is not None:
            rates = {name: case.flops() / row[f"{name}_us"] * 1e6 for name in ("paged", "contiguous")}
            rate = matmul_rate(heads.dtype, quick)
            row |= {"flops": case.flops(), "tflop_per_s": rates["paged"] / 1e12}
            row |= {"of_matmul": rates["paged"] / rate, "contiguous_of_matmul": rates["contiguous"] / rate}
            rows.append({"chunk": chunk, "prior": prior} | row)
    return rows


def block_order(quick: bool) -> list[Row]:
    """Paged decode attention alone, over blocks one after another in memory and in random order."""
    sizes = [(8, 1024), (8, 4096)] if ON_CPU else [(1, 32768), (8, 4096), (32, 4096)]
    rows = []
    for batch, context in [(2, 100)] if quick else sizes:
        case = Case(LLAMA_8B, batch, context)
        row = compare(
            case, lambda layers: {kind: (layers.paged(kind), kind) for kind in ("consecutive", "scattered")}, quick
        )
        if row is not None:
            ratio = row["scattered_us"] / row["consecutive_us"]
            rows.append({"batch": batch, "context": context} | row | {"ratio": ratio})
    return rows


def shared_prefix(quick: bool) -> list[Row]:
    """Decodes whose contexts begin with the same tokens: over the same blocks, and over blocks of their own.

    The compulsory bytes are those of the same blocks: what they share is read once.
    """
    sizes = [(4, 1024, 64), (8, 1024, 64)] if ON_CPU else [(4, 4096, 128), (8, 4096, 256), (32, 4096, 256)]
    rows = []
    for batch, prefix, own in [(3, 64, 9)] if quick else sizes:
        case = Case(LLAMA_8B, batch, prefix + own, prefix=prefix)
        row = compare(
            case,
            lambda layers: {
                "shared": (layers.paged("shared"), "shared"),
                "separate": (layers.paged("scattered"), "scattered"),
                "contiguous": (layers.of_contiguous("scattered"), "scattered"),
            },
            quick,
        )
        if row is not None:
            row["compulsory_bytes"] = case.compulsory_bytes()
            row["gb_per_s"] = case.compulsory_bytes() / row["shared_us"] / 1e3
            row["speedup"] = row["separate_us"] / row["shared_us"]
            rows.append({"batch": batch, "prefix": prefix, "own": own} | row)
    return rows


# -- tables ------------------------------------------------------------------------------------------------------


_HEADS = {"heads": ("heads", ""), "head_dim": ("dim", ""), "dtype": ("dtype", ""), "backend": ("backend", "")}
_TIMES = {f"{name}_us": (name, ",.0f") for name in ("paged", "contiguous", "gathered")}
_CHECK = {"spread": ("spread", ".0%"), "error": ("error", ".0e"), "agrees": ("agrees", "")}
PARTS = (
    Part(
        limits,
        "what shares are of",
        {"what": ("", ""), "dtype": ("dtype", ""), "rate": ("rate", ",.2f"), "unit": ("", "")},
    ),
    Part(
        decode,
        "decode: one query for each sequence (us)",
        _HEADS
        | {"batch": ("batch", ""), "context": ("context", ",")}
        | _TIMES
        | {"gb_per_s": ("GB/s", ",.1f"), "of_copy": ("of copy", ".0%")}
        | {"contiguous_of_copy": ("contiguous of copy", ".0%")}
        | _CHECK,
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
    ),
    Part(
        block_order,
        "decode over consecutive and over scattered blocks (us)",
        _HEADS
        | {"batch": ("batch", ""), "context": ("context", ",")}
        | {"consecutive_us": ("consecutive", ",.0f"), "scattered_us": ("scattered", ",.0f")}
        | {"ratio": ("ratio", ".2f")}
        | _CHECK,
    ),
    Part(
        shared_prefix,
        "decode of sequences with a common prefix, over the same blocks and over blocks of their own (us)",
        _HEADS
        | {"batch": ("batch", ""), "prefix": ("prefix", ","), "own": ("own", ",")}
        | {f"{name}_us": (name, ",.0f") for name in ("shared", "separate", "contiguous")}
        | {"gb_per_s": ("GB/s", ",.1f"), "speedup": ("separate / shared", ".2f")}
        | _CHECK,
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
