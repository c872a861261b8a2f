"""An example: one step of attention over a paged KV cache, the code under test in the simulator's own tests.

Each threadgroup computes one query head of one sequence; its simdgroups share the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

HEADER = """
// The running maximum and sum of one simdgroup's softmax.
struct Softmax {
  float maximum, sum;
  Softmax() thread : maximum(-INFINITY), sum(0.0f) {}
  // Takes a score; returns the factor for what was accumulated so far.
  float update(float score, thread float& weight) thread {
    float larger = metal::max(maximum, score);
    float correction = metal::fast::exp(maximum - larger);
    weight = metal::fast::exp(score - larger);
    sum = sum * correction + weight;
    maximum = larger;
    return correction;
  }
};
template <typename T>
METAL_FUNC float4 load4(const device T* p) {
  return float4(*reinterpret_cast<const device vec<T, 4>*>(p));
}
template <int N>
METAL_FUNC float largest(const threadgroup float* v) {
  float r = v[0];
  for (int i = 1; i < N; i++) r = metal::max(r, v[i]);
  return r;
}
constant float LOG2E = 1.44269504f;
"""

SOURCE = """
  constexpr int SIMDGROUPS = 8;
  constexpr int PER_LANE = D / 32;
  static_assert(PER_LANE == 4, "head_dim 128");
  const int head = threadgroup_position_in_grid.y;
  const int sequence = threadgroup_position_in_grid.z;
  const int heads = q_shape[1];
  const int kv_head = head / (heads / KV_HEADS);
  const int group = simdgroup_index_in_threadgroup;
  const int lane = thread_index_in_simdgroup;

  threadgroup float maxima[SIMDGROUPS];
  threadgroup float sums[SIMDGROUPS];
  threadgroup float partial[SIMDGROUPS * D];

  const int context = context_lengths[sequence];
  auto table = block_table + sequence * block_table_shape[1];
  float4 qv = load4(q + (size_t(sequence) * heads + head) * D + lane * PER_LANE) * scale;

  Softmax softmax;
  float4 acc = float4(0.0f);
  const int blocks = (context + BLOCK - 1) / BLOCK;
  for (int b = group; b < blocks; b += SIMDGROUPS) {
    const size_t base = (size_t(table[b]) * BLOCK * KV_HEADS + kv_head) * D + lane * PER_LANE;
    const int tokens = min(BLOCK, context - b * BLOCK);
    for (int j = 0; j < tokens; j++) {
      float4 kv = load4(k_cache + base + size_t(j) * KV_HEADS * D);
      float score = simd_sum(dot(qv, kv));
      float weight;
      float correction = softmax.update(score, weight);
      float4 vv = load4(v_cache + base + size_t(j) * KV_HEADS * D);
      acc = acc * correction + weight * vv;
    }
  }

  if (lane == 0) {
    maxima[group] = softmax.maximum;
    sums[group] = softmax.sum;
  }
  *reinterpret_cast<threadgroup float4*>(partial + group * D + lane * PER_LANE) = acc;
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const float m = largest<SIMDGROUPS>(maxima);
  float l = 0.0f;
  for (int i = 0; i < SIMDGROUPS; i++) {
    l += sums[i] == 0.0f ? 0.0f : sums[i] * metal::exp2((maxima[i] - m) * LOG2E);
  }
  const int d = thread_position_in_threadgroup.x;
  if (d < D) {
    float o = 0.0f;
    for (int i = 0; i < SIMDGROUPS; i++) {
      if (sums[i] != 0.0f) o += partial[i * D + d] * metal::exp2((maxima[i] - m) * LOG2E);
    }
    out[(size_t(sequence) * heads + head) * D + d] = static_cast<T>(l == 0.0f ? 0.0f : o / l);
  }
"""


def make_kernel(source: str = SOURCE, header: str = HEADER) -> Any:
    """The kernel, or a changed one."""
    return mx.fast.metal_kernel(
        name="paged",
        input_names=["q", "k_cache", "v_cache", "block_table", "context_lengths", "scale"],
        output_names=["out"],
        source=source,
        header=header,
    )


def attend(kernel: Any, case: dict[str, mx.array]) -> mx.array:
    """One decode step: [sequences, heads, head_dim]."""
    q, k_cache = case["q"], case["k_cache"]
    sequences, heads, head_dim = q.shape
    _, block, kv_heads, _ = k_cache.shape
    (out,) = kernel(
        inputs=[case[name] for name in ("q", "k_cache", "v_cache", "table", "lengths", "scale")],
        template=[("T", q.dtype), ("D", head_dim), ("BLOCK", block), ("KV_HEADS", kv_heads)],
        grid=(256, heads, sequences),
        threadgroup=(256, 1, 1),
        output_shapes=[q.shape],
        output_dtypes=[q.dtype],
    )
    return out


def make_case(
    lengths: Sequence[int],
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 128,
    block: int = 16,
    dtype: mx.Dtype = mx.float16,
    seed: int = 0,
) -> dict[str, mx.array]:
    """Random inputs; every sequence has scattered blocks and unused table entries of -1."""
    rng = np.random.default_rng(seed)
    blocks = [-(-n // block) for n in lengths]
    total = sum(blocks) + 3
    shuffled = list(rng.permutation(total))
    table = np.full((len(lengths), max(blocks) + 1), -1, np.int32)
    for row, count in zip(table, blocks, strict=True):
        row[:count] = [shuffled.pop() for _ in range(count)]

    def normal(*shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)

    return {
        "q": normal(len(lengths), heads, head_dim),
        "k_cache": normal(total, block, kv_heads, head_dim),
        "v_cache": normal(total, block, kv_heads, head_dim),
        "table": mx.array(table),
        "lengths": mx.array(np.array(lengths, np.int32)),
        "scale": mx.array(head_dim**-0.5, dtype=mx.float32),
    }


def reference(case: dict[str, mx.array]) -> np.ndarray:
    """The same in float64."""
    q, k_cache, v_cache = (
        np.array(case[name].astype(mx.float32)).astype(np.float64) for name in ("q", "k_cache", "v_cache")
    )
    table, lengths = np.array(case["table"]), np.array(case["lengths"])
    out = np.zeros(q.shape)
    kv_heads = k_cache.shape[2]
    for s, length in enumerate(lengths):
        used = table[s, : -(-length // k_cache.shape[1])]
        keys = k_cache[used].reshape(-1, *k_cache.shape[2:])[:length]
        values = v_cache[used].reshape(-1, *v_cache.shape[2:])[:length]
        for h in range(q.shape[1]):
            kv_head = h // (q.shape[1] // kv_heads)
            scores = keys[:, kv_head] @ q[s, h] * case["scale"].item()
            weights = np.exp(scores - scores.max())
            out[s, h] = weights / weights.sum() @ values[:, kv_head]
    return out
