"""What the Metal kernels read, write and wait for, counted by the simulator: no Mac needed, and no time measured.

    python benchmarks/kernel_traffic.py [--quick] [--json FILE]     count, print tables, write the raw numbers
    python benchmarks/kernel_traffic.py --markdown FILE             the tables of such a file

Run from a checkout on Linux: tests/metalsim runs the kernels thread by thread and counts what each load and store asks
for. It has no cache, so these are upper bounds of what memory delivers. The same command gives the same numbers again.
The kernels are divided among threadgroups as for a GPU of 40 cores, since there is none to ask.

Float16. One KV head is run, with the query heads that share it, of a step that is divided as for all of them; what is
a total is multiplied by their number, since the others do the same to other data (a test compares). Prefills take the
simulator longer than decodes, so their chunks are a few hundred tokens, where a model's are thousands. The bounds are
arithmetic on published bandwidths: nothing here was measured on a chip.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import report
from kernel_launches import DTYPE, LINE_BYTES, METAL, Heads, counts, launches, make_arrays, register_words
from report import Part, Row

from mlx_paged import paged_attention
from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.kernel_backend import shape_of
from mlx_paged.attention.work_items import decode_layout, tile_for
from mlx_paged.cache.kv_cache import LayerPool

BANDWIDTHS = {  # GB/s, as Apple publishes them
    "M1": 68,
    "M1 Pro": 200,
    "M1 Max": 400,
    "M1 Ultra": 800,
    "M3 Ultra": 819,
    "M4": 120,
    "M4 Pro": 273,
    "M4 Max": 546,
    "M5": 153,
    "M5 Pro": 307,
    "M5 Max": 614,
}


LLAMA_8B = Heads(32, 8, 128)
ALL_HEADS = (  # 4, 7, 1, 5, 7, 16, 6 and 8 query heads to a KV head
    LLAMA_8B,
    Heads(14, 2, 64),
    Heads(32, 32, 128),
    Heads(40, 8, 128),
    Heads(28, 4, 128),
    Heads(64, 4, 128),
    Heads(24, 4, 256),
    Heads(16, 2, 256),
)
WORDS_BEFORE = {  # in float16, and in float32
    LLAMA_8B: (74, 88),
    Heads(24, 4, 256): (90, 75),
    Heads(16, 2, 256): (95, 93),
    Heads(8, 1, 256): (95, 93),
    Heads(14, 2, 64): (75, 85),
}
TINY = Heads(6, 2, 64)  # for --quick


# -- decode ------------------------------------------------------------------------------------------------------


def count_decode(
    heads: Heads,
    batch: int,
    context: int,
    block_size: int = 16,
    window: int | None = None,
    kv_cache_dtype: str | None = None,
) -> Row:
    arrays = make_arrays(heads, batch, context, 1, block_size, kv_cache_dtype)
    shape = heads.shape._replace(codes=arrays.pool.codes)
    plan = METAL.plan_decode(np.full(batch, context), np.arange(batch + 1), window, shape)
    num_keys = batch * (context if window is None else min(window, context))
    reports = launches(lambda: METAL.run(*arrays, plan, AttentionOptions(heads.head_dim**-0.5)))
    row = {**heads.as_columns(), "batch": batch, "context": context}
    row |= counts(reports, heads, heads.kv_bytes(num_keys), num_keys)
    return row | {"register_words": register_words(shape)}


def decode(quick: bool) -> list[Row]:
    """One query for each sequence."""
    if quick:
        return [count_decode(TINY, batch, context) for batch, context in ((1, 700), (3, 41))]
    sizes = {heads: [(1, 4096), (1, 32768), (8, 4096)] for heads in ALL_HEADS}
    for heads in ALL_HEADS[-2:]:
        sizes[heads] = sizes[heads][:1]
    for heads in ALL_HEADS[:2]:  # it takes 10 seconds and more
        sizes[heads].append((8, 32768))
    return [count_decode(heads, *size) for heads in ALL_HEADS for size in sizes[heads]]


def registers(quick: bool) -> list[Row]:
    """What a thread of paged_decode keeps, and kept when a simdgroup computed all query heads of a KV head."""
    rows = []
    for heads, before in list(WORDS_BEFORE.items())[: 1 if quick else None]:
        for dtype, words in zip((mx.float16, mx.float32), before, strict=True):
            shape = heads.shape._replace(element_size=dtype.size)
            layout, group = decode_layout(shape), shape.heads_per_kv_head
            readers = -(-group // layout.rows_per_simdgroup)
            row = {**heads.as_columns(), "dtype": str(dtype).removeprefix("mlx.core."), "readers": readers}
            row |= {name: getattr(layout, name) for name in ("rows_per_simdgroup", "simdgroups", "lanes", "batch")}
            row |= {"load_bytes": layout.width * dtype.size, "words": register_words(shape), "words_before": words}
            rows.append(row)
    return rows


def quantised(quick: bool) -> list[Row]:
    """Decode of K and V that are codes, over the compulsory bytes of float16."""
    sizes = [(TINY, 300)] if quick else [(LLAMA_8B, 4096), (Heads(32, 32, 128), 4096), (Heads(24, 4, 256), 4096)]
    return [
        {"kv_cache_dtype": name} | count_decode(heads, 1, context, kv_cache_dtype=name)
        for heads, context in sizes
        for name in ("int8", "k8v4", "fp8")
    ]


def blocks_and_windows(quick: bool) -> list[Row]:
    """Decode by block size, and with a window that begins within a block."""
    heads, context, window = (TINY, 300, 70) if quick else (LLAMA_8B, 4096, 1001)
    return [
        {"block_size": block_size, "visible": width or context}
        | count_decode(heads, 1, context, block_size=block_size, window=width)
        for block_size in (8, 16, 64)
        for width in (None, window)
    ]


def count_shared(heads: Heads, batch: int, prefix: int, own: int) -> Row:
    """Decode by `paged_attention` of sequences whose contexts begin with the same blocks; all heads."""
    context, num_heads, head_dim = prefix + own, heads.num_heads, heads.head_dim
    num_common, num_own = prefix // 16, -(-own // 16)
    block_tables = np.zeros((batch, num_common + num_own), np.int32)
    block_tables[:, :num_common] = np.arange(num_common)
    block_tables[:, num_common:] = num_common + np.arange(batch * num_own).reshape(batch, num_own)
    q = mx.random.normal((batch, num_heads, head_dim), DTYPE)
    pool = (num_common + batch * num_own, 16, heads.num_kv_heads, head_dim)
    k_cache, v_cache = (mx.random.normal(pool, DTYPE) for _ in range(2))
    lengths = np.full(batch, context, np.int32), np.arange(batch + 1, dtype=np.int32)
    scale = head_dim**-0.5
    reports = launches(
        lambda: paged_attention(q, k_cache, v_cache, block_tables, *lengths, scale=scale, backend="metal")
    )
    traffic = [report.traffic for report in reports if report.traffic is not None]
    caches = [each.buffers[name] for each in traffic for name in ("k_cache", "v_cache") if name in each.buffers]
    partial = [each.buffers[name].bytes_written for each in traffic[:-1] for name in ("out", "lse")]
    partial += [traffic[-1].buffers[name].bytes_read for name in ("parts", "lse", "shared_parts", "shared_lse")]
    kv_bytes = heads.kv_bytes(prefix + batch * own)
    return {
        **heads.as_columns(),
        "sequences": batch,
        "prefix": prefix,
        "own": own,
        "threadgroups": sum(each.threadgroups for each in traffic[:-1]),
        "kv_bytes": kv_bytes,
        "separate": heads.kv_bytes(batch * context) / kv_bytes,
        "read": sum(cache.bytes_read for cache in caches) / kv_bytes,
        "lines": sum(cache.lines_read for cache in caches) * LINE_BYTES / kv_bytes,
        "partial": sum(partial) / kv_bytes,
    }


def shared(quick: bool) -> list[Row]:
    """Beams with one prompt; requests with one system prompt, whose queries make several tiles."""
    if quick:
        return [count_shared(TINY, 6, 512, 9)]
    return [
        count_shared(LLAMA_8B, 4, 4096, 64),
        count_shared(Heads(14, 2, 64), 4, 4096, 64),
        count_shared(LLAMA_8B, 16, 1024, 64),
    ]


# -- prefill -----------------------------------------------------------------------------------------------------


def count_prefill(heads: Heads, chunk: int, prior: int) -> Row:
    context, group, tile = chunk + prior, heads.shape.heads_per_kv_head, tile_for(heads.shape)
    arrays = make_arrays(heads, 1, context, chunk, block_size=16)
    plan = METAL.plan_prefill(
        np.array([context], np.int32), np.array([0, chunk], np.int32), window=None, shape=heads.shape
    )
    reports = launches(lambda: METAL.run(*arrays, plan, AttentionOptions(heads.head_dim**-0.5)))
    last_rows = np.minimum(np.arange(tile.rows, chunk * group + tile.rows, tile.rows), chunk * group) - 1
    seen_by_tiles = heads.kv_bytes(int((prior + last_rows // group + 1).sum()))
    counted = counts(reports, heads, heads.kv_bytes(context), context)
    flops = 4 * heads.num_heads * heads.head_dim * sum(range(prior + 1, context + 1))
    bytes_read = counted["read"] * counted["kv_bytes"]
    counted["partial"] /= counted["read"]
    row = {**heads.as_columns(), "chunk": chunk, "prior": prior, "tile": f"{tile.rows} x {tile.keys}"}
    row |= {"tiles": len(last_rows), "of_tiles": bytes_read / seen_by_tiles, "flops_per_byte": flops / bytes_read}
    return row | counted


def prefill(quick: bool) -> list[Row]:
    """A chunk of one prompt, alone and after others; a few tokens, as when they are verified."""
    if quick:
        return [count_prefill(TINY, chunk, prior) for chunk, prior in ((21, 0), (3, 50))]
    sizes = [(512, 0), (128, 896), (4, 4092)]
    return [count_prefill(heads, *size) for heads in (*ALL_HEADS[:2], Heads(16, 8, 256)) for size in sizes]


# -- latent attention --------------------------------------------------------------------------------------------


def count_latent(num_heads: int, batch: int, num_queries: int, context: int) -> Row:
    """Sequences with the shape of DeepSeek V3's rows, whose K holds its V, and so many queries each."""
    heads, value_dim = Heads(num_heads, 1, 576), 512
    q, pool, tables = make_arrays(heads, batch, context, num_queries, block_size=16)
    pool = LayerPool({"k": pool.keys}, latent_dim=value_dim)
    starts = np.arange(batch + 1, dtype=np.int32) * num_queries
    plan = METAL.plan_prefill(np.full(batch, context, np.int32), starts, window=None, shape=shape_of(q, pool))
    reports = launches(lambda: METAL.run(q, pool, tables, plan, AttentionOptions(0.1)))
    counted = counts(reports, heads, heads.kv_bytes(batch * context) // 2, batch * context)
    pairs = batch * num_heads * sum(range(context - num_queries + 1, context + 1))
    flops_per_byte = 2 * (heads.head_dim + value_dim) * pairs / (counted["read"] * counted["kv_bytes"])
    sizes = {"heads": num_heads, "batch": batch, "queries": num_queries, "context": context}
    counted["partial"] /= counted["read"]
    return sizes | {"flops_per_byte": flops_per_byte} | counted


def latent(quick: bool) -> list[Row]:
    """Decodes, and a chunk of a prompt."""
    if quick:
        return [count_latent(20, 2, 1, 64), count_latent(4, 1, 9, 48)]
    sizes = [(16, 1, 1, 4096), (20, 8, 1, 4096), (128, 1, 1, 4096), (20, 1, 32, 1024)]
    return [count_latent(*each) for each in sizes]


# -- bounds ------------------------------------------------------------------------------------------------------


def bounds(quick: bool) -> list[Row]:
    """Microseconds that reading K and V of one layer once takes at a chip's published bandwidth."""
    sizes = {f"batch_{batch}_{context}": batch * context for batch in (1, 8) for context in (4096, 32768)}
    return [
        {"chip": chip, "bandwidth": bandwidth}
        | {size: LLAMA_8B.kv_bytes(num_keys) / bandwidth / 1e3 for size, num_keys in sizes.items()}
        for chip, bandwidth in BANDWIDTHS.items()
    ]


# -- tables ------------------------------------------------------------------------------------------------------


_HEADS = {"heads": ("heads", ""), "head_dim": ("dim", "")}
_READ = {"read": ("bytes read", ".3f"), "lines": ("lines", ".3f")}
_THREADGROUPS = {"threadgroups": ("threadgroups", ",")}
_PARTIAL = {"partial": ("partial results", ".1%")}
_MEETINGS = {
    "barriers": ("barriers / key", ".3f"),
    "simdgroup_functions": ("simdgroup functions / key", ".1f"),
    "threadgroup_memory": ("threadgroup memory", ","),
}
PARTS = (
    Part(
        decode,
        "decode: bytes of K and V that threadgroups read, each once, over the compulsory ones; what all their "
        "simdgroups ask for, since neighbours read a key again for other query heads, and 128-byte lines of that; "
        "partial results as a share of the compulsory bytes",
        _HEADS
        | {"batch": ("batch", ""), "context": ("context", ",")}
        | _THREADGROUPS
        | {"distinct": ("bytes read", ".3f"), "read": ("asked for", ".3f"), "lines": ("lines", ".3f")}
        | _PARTIAL
        | _MEETINGS
        | {"register_words": ("words per thread", "")},
    ),
    Part(
        registers,
        "words of 32 bits that a thread of decode keeps, without addresses; before: when one simdgroup "
        "computed all query heads of a KV head; readers: simdgroups that read the same keys, for other heads each",
        _HEADS
        | {"dtype": ("dtype", ""), "words_before": ("before", ""), "words": ("words", "")}
        | {"rows_per_simdgroup": ("heads a simdgroup", ""), "readers": ("readers", "")}
        | {"simdgroups": ("simdgroups", ""), "lanes": ("lanes to a row", "")}
        | {"load_bytes": ("bytes a load", ""), "batch": ("rows at once", "")},
    ),
    Part(
        quantised,
        "decode over quantised K and V, batch 1: bytes and lines of codes and parameters over the bytes of float16",
        _HEADS
        | {"kv_cache_dtype": ("K and V", ""), "context": ("context", ",")}
        | {"distinct": ("bytes read", ".3f"), "read": ("asked for", ".3f"), "lines": ("lines", ".3f")}
        | {"simdgroup_functions": ("simdgroup functions / key", ".1f"), "register_words": ("words per thread", "")},
    ),
    Part(
        blocks_and_windows,
        "decode by block size and window (a query sees `visible` tokens), batch 1",
        {"block_size": ("block size", ""), "context": ("context", ","), "visible": ("visible", ",")}
        | _THREADGROUPS
        | _READ
        | _PARTIAL,
    ),
    Part(
        shared,
        "decode of sequences with a common prefix, over the bytes of their distinct tokens; separate: each on its own",
        _HEADS
        | {"sequences": ("sequences", ""), "prefix": ("prefix", ","), "own": ("own", ",")}
        | _THREADGROUPS
        | {"separate": ("separate", ".2f")}
        | _READ
        | _PARTIAL,
    ),
    Part(
        prefill,
        "prefill: a chunk after `prior` tokens; K and V over the compulsory ones, and over what the tiles see, partial "
        "results as a share of K and V read",
        _HEADS
        | {"chunk": ("chunk", ""), "prior": ("prior", ",")}
        | {"tile": ("rows x keys", ""), "tiles": ("tiles", "")}
        | _THREADGROUPS
        | {"read": ("bytes read", ".2f"), "of_tiles": ("of what tiles see", ".3f"), "lines": ("lines", ".2f")}
        | _PARTIAL
        | {"flops_per_byte": ("FLOP / byte", ".1f")}
        | _MEETINGS,
    ),
    Part(
        latent,
        "latent attention, rows of 512 + 64: bytes and lines of K, which holds V, over the compulsory ones; partial "
        "results as a share of K read",
        {"heads": ("heads", ""), "batch": ("batch", ""), "queries": ("queries", ""), "context": ("context", ",")}
        | _THREADGROUPS
        | {"read": ("bytes read", ".3f"), "lines": ("lines", ".2f")}
        | _PARTIAL
        | {"flops_per_byte": ("FLOP / byte", ".1f")}
        | _MEETINGS,
    ),
    Part(
        bounds,
        "A BOUND, NOT A MEASUREMENT: us to read K and V of one layer once, if a chip's whole published bandwidth went "
        "into it; batch x context, 32/8 heads of 128, float16",
        {"chip": ("chip", ""), "bandwidth": ("GB/s", "")}
        | {
            f"batch_{batch}_{context}": (f"{batch} x {context:,}", ",.0f")
            for batch in (1, 8)
            for context in (4096, 32768)
        },
    ),
)


if __name__ == "__main__":
    report.main("kernel_traffic.py", __doc__, PARTS, numpy=np.__version__)
