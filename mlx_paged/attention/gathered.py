"""Long stretches of a prompt by MLX's own attention, over keys and values that are gathered from the blocks.

Some GPUs have units for matrix products that MLX's attention uses and our kernels do not. There a copy of the context
costs less than it saves, once a stretch has many queries. Both ways add the same products in another order, so last
bits may depend on how a prompt is cut into steps.
"""

import os

import mlx.core as mx
import numpy as np

from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.cache.kv_cache import LayerPool

VARIABLE = "MLX_PAGED_PREFILL"
DTYPES = (mx.float16, mx.bfloat16)
HEAD_DIMS = (64, 96, 128)  # for which MLX has such a kernel
MIN_QUERIES = 512
MAX_BYTES = 128 << 20  # of the keys that are gathered at once


def is_wanted(has_matrix_units: bool) -> bool:
    """Whether this is done at all: where the GPU has such units, unless the environment says otherwise.

    Raises ValueError if it says what nobody knows.
    """
    asked = os.environ.get(VARIABLE)
    if asked not in (None, "kernel", "gathered"):
        raise ValueError(f"{VARIABLE} must be kernel or gathered, got {asked!r}")
    return has_matrix_units if asked is None else asked == "gathered"


def is_for(
    q: mx.array, pool: LayerPool, metadata: AttentionMetadata, options: AttentionOptions, has_matrix_units: bool
) -> bool:
    """Whether this is done for layers like this: it is wanted, which a step asks once, and MLX computes them fast."""
    if not metadata.plan_once("gathers", lambda: is_wanted(has_matrix_units)):
        return False
    plain = options.softcap is None and options.sinks is None and not pool.latent_dim
    dims = {*pool.block_shape[2:]}
    return plain and q.dtype in DTYPES and pool.dtype == q.dtype and len(dims) == 1 and dims <= set(HEAD_DIMS)


def choose(metadata: AttentionMetadata, pool: LayerPool, window: int | None) -> np.ndarray:
    """Say of which sequences the queries are computed so, bool [num_seqs]."""
    _, num_kv_heads, head_dim, _ = pool.block_shape
    most_keys = MAX_BYTES // (num_kv_heads * head_dim * pool.dtype.size)
    if window is not None:
        most_keys = min(most_keys, window)
    return (metadata.query_lens >= MIN_QUERIES) & (metadata.context_lens <= most_keys)


def attend(q: mx.array, pool: LayerPool, metadata: AttentionMetadata, scale: float) -> mx.array:
    """Causal attention of q [num_tokens, num_heads, head_dim], sequence by sequence. Returns the same shape."""
    outputs = []
    for seq, num_keys in enumerate(metadata.context_lens.tolist()):
        first, last = metadata.cu_seqlens_q[seq : seq + 2].tolist()
        block_ids = metadata.block_tables[seq, : -(-num_keys // pool.block_shape[0])]
        if pool.write_done is not None:  # MLX does not know that the pools are written: the ids wait for it
            block_ids = block_ids + 0 * pool.write_done[:1]
        keys, values = (pool.gather_blocks(name, block_ids)[None, :, :num_keys] for name in "kv")
        queries = q[first:last].swapaxes(0, 1)[None]
        out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask="causal")
        outputs.append(out[0].swapaxes(0, 1))
        if pool.write_done is not None:  # nor that the next write has to wait for this
            over = 0 * mx.isinf(out.flatten()[:8]).astype(mx.int32)
            pool.reads_done[-1:] = [(pool.reads_done or [pool.write_done])[-1] + over]
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
