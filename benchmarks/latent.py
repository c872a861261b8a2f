"""How fast latent attention over a paged cache is on this device, beside MLX's own attention over the same rows.

    python benchmarks/latent.py --json latent.json    measure, print a table, write the raw numbers

Rows have the shape of DeepSeek V3's, 512 + 64 numbers of bfloat16 for all heads. Two contenders: *paged*, `attend` over
a pool of blocks in random order; *gathered*, MLX's `scaled_dot_product_attention` with the same absorbed queries after
the blocks were gathered, V the first 512 columns of K. `error` is the norm of their difference over that of the second
one. Measured as attention.py does. GB/s counts each row once, and queries and results; TFLOP/s each pair of a query and
a key that it sees. On a CPU the shapes are a few small ones in float32. **It has not been run on a GPU.**
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np
import report
from attention_layers import BLOCK_SIZE, CACHES, ON_CPU, Contender, measure
from report import Part, Row

from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.attention.paged_attention import choose_backend
from mlx_paged.cache.kv_cache import LayerPool
from mlx_paged.cache.layer_spec import LayerSpec

VALUE_DIM, KEY_DIM = 512, 576
OPTIONS = AttentionOptions(KEY_DIM**-0.5)


def compare(num_heads: int, batch: int, num_queries: int, context: int, quick: bool) -> Row:
    """Sequences of one length with so many queries each."""
    dtype = mx.float32 if ON_CPU and not quick else mx.bfloat16
    per_sequence = -(-context // BLOCK_SIZE)
    tables = np.random.default_rng(0).permutation(batch * per_sequence).astype(np.int32).reshape(batch, per_sequence)
    starts = np.arange(batch + 1, dtype=np.int32) * num_queries
    metadata = AttentionMetadata(mx.array(tables), np.full(batch, context, np.int32), starts)
    backend = choose_backend(LayerSpec(1, KEY_DIM, VALUE_DIM, dtype, value_in_key=True), num_heads, BLOCK_SIZE)
    row_bytes = batch * context * KEY_DIM * dtype.size
    num_layers = 2 if quick else max(2, -(-CACHES // row_bytes))
    shape = batch * per_sequence, BLOCK_SIZE, 1, KEY_DIM
    pools = [LayerPool({"k": mx.random.normal(shape, dtype)}, latent_dim=VALUE_DIM) for _ in range(num_layers)]
    queries = mx.random.normal((batch * num_queries, num_heads, KEY_DIM), dtype) * 2
    mx.eval(queries, [pool.arrays for pool in pools])

    def gathered(q: mx.array, layer: int) -> mx.array:
        keys = pools[layer].keys[metadata.block_tables].flatten(1, 2)[:, :context].swapaxes(1, 2)
        rows = q.reshape(batch, num_queries, num_heads, KEY_DIM).swapaxes(1, 2)
        mask = "causal" if num_queries > 1 else None
        attend = mx.fast.scaled_dot_product_attention
        out = attend(rows, keys, keys[..., :VALUE_DIM], scale=OPTIONS.scale, mask=mask)
        return out.swapaxes(1, 2).flatten(0, 1)

    def chained(call: Callable[[mx.array, int], mx.array]) -> Contender:
        """The results, with what they lack, are the next queries."""
        return Contender(
            queries, lambda q, layer: mx.concatenate([call(q, layer), q[..., VALUE_DIM:]], axis=-1), num_layers
        )

    ways = {"paged": lambda q, layer: backend.attend(q, pools[layer], metadata, OPTIONS), "gathered": gathered}
    found, expected = (way(queries, 0).astype(mx.float32) for way in ways.values())
    error = (mx.linalg.norm((found - expected).flatten()) / mx.linalg.norm(expected.flatten())).item()
    seconds = measure({name: chained(way) for name, way in ways.items()}, quick)
    pairs = batch * num_heads * num_queries * (2 * context - num_queries + 1) // 2
    moved = row_bytes + batch * num_queries * num_heads * (KEY_DIM + VALUE_DIM) * dtype.size
    return {
        "backend": backend.name,
        "heads": num_heads,
        "batch": batch,
        "queries": num_queries,
        "context": context,
        "paged_us": 1e6 * seconds["paged"],
        "gathered_us": 1e6 * seconds["gathered"],
        "gb_per_s": moved / seconds["paged"] / 1e9,
        "tflop_per_s": 2 * (KEY_DIM + VALUE_DIM) * pairs / seconds["paged"] / 1e12,
        "spread": seconds["spread"],
        "error": error,
    }


def latent(quick: bool) -> Iterator[Row]:
    """Decodes, and chunks of a prompt, alone and after others."""
    if quick:
        sizes = [(20, 2, 1, 40), (5, 1, 9, 50)]
    elif ON_CPU:
        sizes = [(16, 1, 1, 1024), (16, 8, 1, 1024), (16, 1, 128, 512)]
    else:
        decodes = [(16, 1, 1, 16384), (16, 8, 1, 4096), (128, 1, 1, 16384), (128, 8, 1, 4096)]
        sizes = [*decodes, (20, 1, 512, 8192), (128, 1, 512, 4096)]
    for each in sizes:
        yield compare(*each, quick)


COLUMNS = {
    "heads": ("heads", ""),
    "backend": ("backend", ""),
    "batch": ("batch", ""),
    "queries": ("queries", ","),
    "context": ("context", ","),
    "paged_us": ("paged", ",.0f"),
    "gathered_us": ("gathered", ",.0f"),
    "gb_per_s": ("GB/s", ",.1f"),
    "tflop_per_s": ("TFLOP/s", ",.2f"),
    "spread": ("spread", ".0%"),
    "error": ("error", ".0e"),
}
LATENT = Part(latent, "Latent attention (us)", COLUMNS, "How fast is latent attention beside MLX's own?", 35)
PARTS = [LATENT]

if __name__ == "__main__":
    report.main("latent.py", __doc__ or "", PARTS)
