"""Calls paged_attention by itself: sequences whose blocks lie anywhere in a pool, beside plain attention."""

from mlx_paged import paged_attention  # isort: skip  (before mlx, so that on Linux it finds OpenBLAS)
import mlx.core as mx

num_heads, num_kv_heads, head_dim, block_size = 8, 2, 64, 16
scale = head_dim**-0.5
k_cache, v_cache = (mx.random.normal((8, block_size, num_kv_heads, head_dim)) for _ in range(2))

# One decode, the 37th token of its sequence, and a chunk of 3 tokens that ends at the 20th of another.
block_tables = mx.array([[5, 0, 3], [7, 2, 0]], mx.int32)  # the last 0 is past the context, and ignored
context_lens = mx.array([37, 20], mx.int32)
cu_seqlens_q = mx.array([0, 1, 4], mx.int32)
q = mx.random.normal((4, num_heads, head_dim))

# On a Mac this is a Metal kernel that reads the blocks where they lie; elsewhere, plain MLX operations.
out = paged_attention(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, scale=scale)


def gathered(cache: mx.array, table: mx.array, context: int) -> mx.array:
    """A sequence's K or V in order: [1, num_kv_heads, context, head_dim]."""
    return cache[table].reshape(-1, num_kv_heads, head_dim)[:context].swapaxes(0, 1)[None]


for table, context, rows in [(block_tables[0], 37, slice(0, 1)), (block_tables[1], 20, slice(1, 4))]:
    k, v = gathered(k_cache, table, context), gathered(v_cache, table, context)
    queries = q[rows].swapaxes(0, 1)[None]
    plain = mx.fast.scaled_dot_product_attention(queries, k, v, scale=scale, mask="causal")[0].swapaxes(0, 1)
    error = mx.abs(plain - out[rows]).max().item()
    print(f"{len(out[rows])} queries over {context} tokens: at most {error:.0e} from plain attention")
