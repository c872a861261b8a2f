"""Attention to K and V of several layers, in blocks and contiguous: errors and times, as attention.py says."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple
from unittest import mock

import mlx.core as mx
import numpy as np
from report import Row

from mlx_paged.attention import gathered
from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.attention.paged_attention import choose_backend
from mlx_paged.attention.shared_prefix import find_shared_prefixes
from mlx_paged.cache.kv_cache import LayerPool
from mlx_paged.cache.layer_spec import LayerSpec
from mlx_paged.runner.memory_plan import device_limit

BLOCK_SIZE = 16
ON_CPU = mx.default_device() == mx.cpu
TOLERANCES = {mx.float32: 2e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}
CACHES = 64 << 20 if ON_CPU else 256 << 20
NOT_FINITE = 1e9  # the error of such results: JSON has no word for it
CHAIN_SECONDS = 0.02
WARM_SECONDS = 1.0  # in which a GPU's clocks rise
WINDOW_SECONDS = 0.4
NUM_WINDOWS = 3
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


def seconds_in_window(contender: Contender, num_calls: int, window: float) -> float:
    """The mean of a call in chains that follow one another for so many seconds, or in one of them."""
    times = [seconds_of_call(contender, num_calls)]
    while num_calls * sum(times) < window:
        times.append(seconds_of_call(contender, num_calls))
    return statistics.fmean(times)


def measure(contenders: dict[str, Contender], quick: bool) -> dict[str, float]:
    """Median seconds of a call of each, and `spread`: the widest range of their windows, over the median."""
    num_calls, num_rounds = dict.fromkeys(contenders, 1 if quick else 2), 0
    warm = time.perf_counter() + WARM_SECONDS
    while num_rounds < (1 if quick else 2) or (not quick and time.perf_counter() < warm):
        for name in contenders:  # at first what is not the calls themselves is most of it
            seconds = seconds_of_call(contenders[name], num_calls[name])
            num_calls[name] = 1 if quick else max(1, min(MOST_CALLS, round(CHAIN_SECONDS / seconds)))
        num_rounds += 1
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for window in range(2 if quick else NUM_WINDOWS):
        for name in list(contenders)[:: 1 if window % 2 == 0 else -1]:
            seconds = seconds_in_window(contenders[name], num_calls[name], 0 if quick else WINDOW_SECONDS)
            times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return medians | {"spread": max((max(each) - min(each)) / medians[name] for name, each in times.items())}


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
        self.backend = choose_backend(
            LayerSpec(heads.num_kv_heads, heads.head_dim, heads.head_dim, heads.dtype), heads.num_heads, BLOCK_SIZE
        )
        host = case.tables()["shared"]
        find = partial(find_shared_prefixes, block_size=BLOCK_SIZE)
        self.metadata["once"] = AttentionMetadata(
            self.tables["shared"], contexts, starts, lambda seqs: find(host[seqs], contexts[seqs])
        )
        shape = (self.tables["scattered"].size, BLOCK_SIZE, heads.num_kv_heads, heads.head_dim)
        self.pools = []
        for _ in range(self.num_layers):
            self.pools.append(LayerPool({name: mx.random.normal(shape, heads.dtype) for name in "kv"}))
            mx.eval(self.pools[-1].arrays)
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
            lambda queries, layer: self.backend.attend(queries, self.pools[layer], metadata, AttentionOptions(scale)),
            self.num_layers,
        )

    def of_contiguous(self, table: str) -> Contender:
        if not self.contiguous:
            for pool in self.pools:
                self.contiguous.append([mx.contiguous(self._gather(cache, table)) for cache in pool.arrays.values()])
                mx.eval(self.contiguous[-1])
        return Contender(
            self.queries, lambda queries, layer: self._dense(queries, *self.contiguous[layer]), self.num_layers
        )

    def gathered(self, table: str) -> Contender:
        def call(queries: mx.array, layer: int) -> mx.array:
            return self._dense(queries, *(self._gather(cache, table) for cache in self.pools[layer].arrays.values()))

        return Contender(self.queries, call, self.num_layers)

    def gathered_prompt(self, table: str) -> Contender:
        """As gathered.py does it for the stretches of a prompt that it takes, sequence by sequence."""
        metadata, scale = self.metadata[table], self.case.heads.head_dim**-0.5
        return Contender(
            self.packed_queries,
            lambda queries, layer: gathered.attend(queries, self.pools[layer], metadata, scale),
            self.num_layers,
        )

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
            blocks = (cache[self.tables[table][sequence]] for cache in self.pools[0].arrays.values())
            caches = [content.flatten(0, 1)[:context] for content in blocks]
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
    row = {"backend": layers.backend.name, "layers": layers.num_layers} | case.heads.as_columns()
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


def with_prompts(layers: Layers) -> dict[str, tuple[Contender, str]]:
    """As with_dense, of a chunk of a prompt: by the kernel, whatever the device, and as it would be gathered."""
    table, ways = "scattered", with_dense(layers)
    paged, _ = ways["paged"]
    with mock.patch.dict(os.environ, {gathered.VARIABLE: "kernel"}):
        paged.call(paged.queries, 0)  # which is asked once for all layers of a step
    return ways | {"gathered": (layers.gathered_prompt(table), table)}


def with_prefix(layers: Layers) -> dict[str, tuple[Contender, str]]:
    """Sequences over the same blocks at first, which the backend has read once if it holds that for faster, and over
    blocks of their own."""
    return {
        "once": (layers.paged("once"), "shared"),
        "each": (layers.paged("shared"), "shared"),
        "separate": (layers.paged("scattered"), "scattered"),
        "contiguous": (layers.of_contiguous("scattered"), "scattered"),
    }
