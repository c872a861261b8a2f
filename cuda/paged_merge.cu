// Joins what paged_decode or paged_prefill computed for the parts of each query: the body of a kernel;
// intrinsics.cuh and tiles.cuh come before it.
//
// Inputs
//   parts         [num_parts, num_heads, VALUE_DIM], T: the mean of each part's values
//   lse           [num_parts, num_heads], float: the base-2 logarithm of its sum of exponentials
//   cu_parts      [num_queries + 1 or more], int32: the parts of query i are cu_parts[i] to cu_parts[i + 1]
//   With SHARED each query has further parts, those of a prefix that it shares; otherwise these are anything:
//   shared_parts  [num_shared_parts, num_heads, VALUE_DIM], T
//   shared_lse    [num_shared_parts, num_heads], float
//   ranges        [num_queries or more, 2], int32: its first one and past its last one, both 0 if it shares nothing
// Output
//   out           [num_queries, num_heads, VALUE_DIM], T: the mean of the parts, weighed by exp2(lse)
//
// Grid          a warp per (query, head): [32 * num_queries, num_heads] threads
// Block         several heads' warps, which have nothing to do with each other
// Warp          lane i owns part i of every 32: its weight; and elements i, i + 32, ... of the output
//
// Must move     (VALUE_DIM elements + a float) per part and head, and VALUE_DIM elements out per query and head.

constexpr int LOADS = (VALUE_DIM + 31) / 32;
const int lane = threadIdx.x;
const int query = blockIdx.x;
const int head = blockIdx.y * blockDim.y + threadIdx.y;
const int num_heads = lse_shape[1];
const int begin = cu_parts[query];
const int num_own = cu_parts[query + 1] - begin;
const int shared_begin = SHARED ? ranges[2 * query] - num_own : 0;  // part num_own is its first one
const int num_parts = num_own + (SHARED ? ranges[2 * query + 1] - ranges[2 * query] : 0);
const auto log_total_of = [&](int i) {
  return i < num_own ? lse[size_t(begin + i) * num_heads + head]
                     : shared_lse[size_t(shared_begin + i) * num_heads + head];
};

float peak = LOWEST;
for (int i = lane; i < num_parts; i += 32) peak = fmaxf(peak, log_total_of(i));
UNROLL for (int mask = 16; mask > 0; mask /= 2) peak = fmaxf(peak, shuffle_xor(peak, mask));

float total = 0.0f;
float output[LOADS] = {};
for (int first = 0; first < num_parts; first += 32) {
  const int count = min(32, num_parts - first);
  const float own = lane < count ? fast_exp2(log_total_of(first + lane) - peak) : 0.0f;
  total += own;
#pragma unroll 4
  for (int i = first; i < first + count; i++) {
    const float weight = shuffle(own, i - first);
    const T* part = i < num_own ? parts + (size_t(begin + i) * num_heads + head) * VALUE_DIM
                                : shared_parts + (size_t(shared_begin + i) * num_heads + head) * VALUE_DIM;
    UNROLL for (int e = 0; e < LOADS; e++) {
      if (lane + e * 32 < VALUE_DIM) output[e] += weight * float(part[lane + e * 32]);
    }
  }
}
UNROLL for (int mask = 16; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
UNROLL for (int e = 0; e < LOADS; e++) {
  if (lane + e * 32 < VALUE_DIM) {
    out[(size_t(query) * num_heads + head) * VALUE_DIM + lane + e * 32] = T(output[e] / total);
  }
}
